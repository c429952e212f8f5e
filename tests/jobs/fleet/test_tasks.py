"""A catalog's tasks are read before any work, answered once, and limited by its gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.publish.verdict import find_verdict
from pipeline.errors import StorageError
from pipeline.run.evaluations import find_evaluations
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from tests.jobs.fleet.tiny_catalog import tiny_catalog

QUESTIONS = [
    {"question": f"The fox jumps {number} times over the", "choices": ["dog", "box"], "answer": 0}
    for number in range(1, 9)
]
# Nothing of it rounds its inputs, so that it is compiled, and quick.
RECIPE = {"name": "int4-blocks", "scheme": {"mode": "int4", "block_size": 32}, "embeddings": None}


def test_tasks_are_refused_answered_and_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_catalog(tmp_path) as catalog:
        questions = catalog.folder / "texts" / "foxes.jsonl"
        broken = [*QUESTIONS[:3], {**QUESTIONS[3], "answer": 2}]
        questions.write_text("".join(f"{json.dumps(row)}\n" for row in broken))
        gate = {"max_flips": 1.0}
        catalog.add("alpha", [RECIPE], tasks=["texts/foxes.jsonl"], gate=gate)
        code, found = catalog.nightly()
        assert code != 0
        assert "foxes.jsonl:4: 'answer' is '2', but there are 2 choices" in str(found)
        assert catalog.work.solves == catalog.work.calls["evaluate"] == 0

        # What ends in the middle of an evaluation goes on with it, and quantizes nothing again.
        questions.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS))
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "evaluate", _fail)
            assert catalog.nightly()[0] != 0
        solves = catalog.work.solves
        assert solves > 0
        code, found = catalog.nightly()
        assert code == 0, catalog.err
        assert catalog.work.solves == solves
        assert found["alpha int4-blocks"]["result"] == "published"
        release = catalog.current("alpha", "int4-blocks")["release"]
        [task] = release["quality"]["tasks"]
        assert (task["name"], task["num_questions"]) == ("foxes", 8)
        assert release["quality"]["source_perplexity"] is None
        run = open_store(str(catalog.folder / "results" / "runs" / release["run_id"]))
        [evaluation] = find_evaluations(run, release["manifest_sha256"], pytest.fail)
        assert list(evaluation.measured_on["tasks"]) == ["foxes"]
        assert evaluation.figures["tasks"] == [task]

        # A limit that nothing meets: what is known is not measured again.
        gate |= {"min_recovery": 100.0}
        before = catalog.work.calls["evaluate"]
        code, found = catalog.nightly()
        assert code == 5
        verdict = find_verdict(catalog.root, found["alpha int4-blocks"]["request_id"])
        assert verdict is not None
        assert any(text.startswith("task foxes: ") for text in verdict.failures)
        assert catalog.work.calls["evaluate"] == before == 2


def _fail(*_: Any) -> None:
    raise StorageError("out of reach")
