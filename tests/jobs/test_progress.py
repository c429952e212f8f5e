import dataclasses
import io
import json

from rich.console import Console

from jobs.logging import JsonConsole, concern
from jobs.progress import watch
from pipeline.run.driver import Step
from pipeline.run.records import LayerRecord, PartRecord, file_key
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
    return Step(event="committed", part=part, record=record, seconds={"solve": 1.26})


def told(*steps: Step, terminal: bool, width: int = 60) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width)
    with watch(planned("int8").plan, console) as report:
        for step in steps:
            report(step)
    return stream.getvalue()


def test_a_log_has_a_line_for_each_part_and_no_control_characters() -> None:
    text = told(committed(0), committed(2), terminal=False)
    assert text.splitlines() == [
        "committed 1/4 rest: 12,345 bytes, solve 1.3s",
        "committed 3/4 transformer_layer_1: 12,345 bytes, solve 1.3s",
    ]


def test_a_log_line_is_never_broken() -> None:
    text = told(Step(event="damaged", text="s3://bucket/" + "x" * 300), terminal=False, width=40)
    assert len(text.splitlines()) == 1


def test_markup_in_what_is_told_is_left_as_it_is() -> None:
    text = told(Step(event="lost", text="a worker [bold]was lost[/bold] (x)"), terminal=False)
    assert "[bold]was lost[/bold]" in text


def test_a_terminal_shows_how_far_the_run_is() -> None:
    text = told(Step(event="resumed", parts=(0, 1), text="2 of 4"), committed(2), terminal=True)
    assert "3/4" in text
    assert "resumed: 2 of 4" in text


def test_machines_get_an_object_for_each_step_and_each_layer() -> None:
    account = {"damping": 0.01, "weight_error": 0.1}
    layers = (
        LayerRecord(path="transformer_layer_0/query", scheme={"mode": "gptq"}, account=account),
        LayerRecord(path="transformer_layer_0/norm", note="no matrix"),
    )
    step = committed(1)
    assert step.record is not None
    step = dataclasses.replace(step, record=dataclasses.replace(step.record, layers=layers))
    concern(run="bert-gptq-0123")
    stream = io.StringIO()
    with watch(planned("int8").plan, JsonConsole(stream)) as report:
        report(step)
        report(Step(event="lost", text="ActorDiedError: a worker was lost"))
        report(Step(event="sealed", seconds={"seal": 0.5}))
    concern()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(line.pop("time") and line.pop("run") == "bert-gptq-0123" for line in found)
    where = {"parts": 4, "part": 1, "block": "transformer_layer_0"}
    assert found == [
        {
            "level": "info", "event": "layer", **where, "layer": "transformer_layer_0/query",
            "scheme": {"mode": "gptq"}, "account": account,
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
