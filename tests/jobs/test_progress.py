import io

from rich.console import Console

from jobs.progress import watch
from pipeline.records import PartRecord, file_key
from pipeline.run import Step
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
