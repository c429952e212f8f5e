"""The command that a job that ended early names as the way to go on."""

import shlex
from typing import Any

import pytest

import jobs.quantize
from jobs.cli.main import app
from jobs.quantize import Job

JOBS = {
    "alone": Job(source_url="", output_url="/runs/a run"),
    "on texts": Job(
        source_url="",
        output_url="memory://bucket/run",
        evaluation_texts=("a b.jsonl", "s3://texts/c.jsonl"),
        evaluation_windows=3,
    ),
    "on sets": Job(
        source_url="",
        output_url="o",
        evaluation_texts=("t",),
        evaluation_sets={"code": ("c.jsonl",), "novels": ("s3://texts/n=1.txt",)},
    ),
    "on a chat": Job(source_url="", output_url="o", evaluation_texts=("t",), chat=False),
    "on tasks": Job(source_url="", output_url="o", tasks=("one.jsonl", "it's two.jsonl")),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_command_to_go_on_asks_for_the_same_evaluation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Job] = []

    def resume_job(job: Job, *_: Any, **__: Any) -> None:
        found.append(job)

    monkeypatch.setattr(jobs.quantize, "resume_job", resume_job)
    program, *arguments = shlex.split(JOBS[name].resume_command)
    assert program == "quantfleet"
    app(arguments, standalone_mode=False)
    assert found == [JOBS[name]]
