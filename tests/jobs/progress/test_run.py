import dataclasses
import io
import json
import logging
from collections.abc import Callable

import pytest
from rich.console import Console

import jobs.logging
from jobs.logging import FORMAT_VARIABLE, LOG, JsonFormatter, TextHandler, configure, set_run
from jobs.progress.run import watch
from pipeline.executor.protocol import Allocation
from pipeline.run.events import Step
from pipeline.run.records import LayerRecord, PartRecord, file_key
from quantizer.schemes import Int4Scheme
from tests.pipeline.executor.test_work_spans import spell
from tests.pipeline.tiny_runs import planned


def committed(part: int) -> Step:
    record = PartRecord(
        part=part,
        plan_digest="0" * 64,
        file=file_key(part),
        sha256="1" * 64,
        size_bytes=12345,
        loaded_bytes=0,
    )
    return Step(event="committed", part=part, record=record, work=[spell("solve", 1.26)])


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Report steps, and return what stderr then holds."""

    def report_all(*steps: Step, terminal: bool, width: int = 60) -> str:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=width)
        configure("text")
        monkeypatch.setattr(jobs.logging, "STDERR", console)
        monkeypatch.setattr(LOG, "handlers", [TextHandler(console)])
        with watch(planned("int8").plan, Allocation(workers=1, threads=2)) as report:
            for step in steps:
                report(step)
        return stream.getvalue()

    return report_all


def test_a_log_has_a_line_for_each_part_and_no_control_characters(
    logged: Callable[..., str],
) -> None:
    text = logged(committed(0), committed(2), terminal=False)
    assert text.splitlines() == [
        "committed 1/4 rest: 12,345 bytes, solve 1.3s",
        "committed 3/4 transformer_layer_1: 12,345 bytes, solve 1.3s",
    ]


def test_a_log_line_is_never_broken(logged: Callable[..., str]) -> None:
    text = logged(Step(event="damaged", text="s3://bucket/" + "x" * 300), terminal=False, width=40)
    assert len(text.splitlines()) == 1


def test_markup_in_messages_is_printed_as_it_is(logged: Callable[..., str]) -> None:
    text = logged(Step(event="lost", text="a worker [bold]was lost[/bold] (x)"), terminal=False)
    assert "[bold]was lost[/bold]" in text


def test_a_terminal_shows_a_progress_bar(logged: Callable[..., str]) -> None:
    text = logged(Step(event="resumed", parts=(0, 1), text="2 of 4"), committed(2), terminal=True)
    assert "3/4" in text
    assert "resumed: 2 of 4" in text


def test_machines_get_a_json_line_for_each_step_and_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    account = {"damping": 0.01, "weight_error": 0.1}
    layers = (
        LayerRecord(path="transformer_layer_0/query", scheme=Int4Scheme(), account=account),
        LayerRecord(path="transformer_layer_0/norm", note="no matrix"),
    )
    step = committed(1)
    assert step.record is not None
    step = dataclasses.replace(step, record=dataclasses.replace(step.record, layers=layers))
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    set_run(run="bert-gptq-0123")
    configure("text")
    monkeypatch.setattr(LOG, "handlers", [handler])
    with watch(planned("int8").plan, Allocation(workers=1, threads=2)) as report:
        report(step)
        report(Step(event="lost", text="ActorDiedError: a worker was lost"))
        report(Step(event="sealed", work=[spell("seal", 0.5)]))
    set_run()
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(line.pop("time") and line.pop("run") == "bert-gptq-0123" for line in found)
    where = {"parts": 4, "part": 1, "block": "transformer_layer_0"}
    assert found == [
        {
            "level": "info", "event": "layer", **where, "layer": "transformer_layer_0/query",
            "scheme": {"mode": "int4", "block_size": 128}, "account": account,
        },
        {
            "level": "info", "event": "layer", **where, "layer": "transformer_layer_0/norm",
            "message": "no matrix",
        },
        {
            "level": "info", "event": "committed", **where, "size_bytes": 12345,
            "seconds": {"solve": 1.26},
            "message": "committed 2/4 transformer_layer_0: 12,345 bytes, solve 1.3s",
        },
        {
            "level": "warning", "event": "lost", "parts": 4,
            "message": "lost: ActorDiedError: a worker was lost",
        },
        {
            "level": "info", "event": "sealed", "parts": 4, "seconds": {"seal": 0.5},
            "message": "sealed",
        },
    ]  # fmt: skip
