"""What a terminal shows of a run, at the widths that terminals have."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.progress.run_view import RunView
from jobs.progress.time_left import Expected
from pipeline.executor.work_spans import Doing
from pipeline.run.events import Step
from tests.pipeline.tiny_runs import planned


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(view: RunView, width: int) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view)
    return [line.rstrip() for line in console.export_text().splitlines()]


def committed(view: RunView, clock: Clock, part: int, seconds: float) -> None:
    clock.now += seconds
    view.report(Step(event="committed", part=part))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> RunView:
    expected = Expected(part_seconds=(1.0, 2.0, 2.0, 2.0), compile_seconds=5.0)
    view = RunView(plan=planned("gptq").plan, num_workers=2, clock=clock)
    assert "time left: known after a block" in "\n".join(shown(view, 80))
    view.expected = expected
    return view


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_under_way(view: RunView, clock: Clock, width: int) -> None:
    for part, seconds in ((0, 3.0), (1, 30.0), (2, 6.0)):
        committed(view, clock, part, seconds)
    view.report(Step(event="lost", text="…"))
    view.hear(
        {
            0: Doing(calls=(("read", 0.4), ("solve", 2.5)), compiling=2),
            1: Doing(),
        }
    )
    clock.now += 1.0
    head, pace, first, second, past = shown(view, width)
    assert head.startswith("Llama3Backbone × gptq ━")
    assert head.endswith("3/4 parts")
    assert pace == "transformer_layer_2  40 s so far · 6.0 s a block · about 5.0 s left"
    assert first == "worker 0  solve 2.5 s, compiling 2 programs · read"
    assert second == "worker 1  waiting"
    assert past == "workers lost: 1"


@pytest.mark.parametrize("width", [80, 120])
def test_workers_that_have_not_answered_yet_start_and_others_are_silent(
    view: RunView, width: int
) -> None:
    assert shown(view, width)[2:] == [
        "worker 0  starting, importing Keras",
        "worker 1  starting, importing Keras",
    ]
    view.hear({0: Doing(), 1: Doing()})
    view.hear({1: Doing()})
    assert shown(view, width)[2:] == ["worker 0  no answer", "worker 1  waiting"]


def test_many_workers_are_counted_by_what_they_do(clock: Clock) -> None:
    view = RunView(plan=planned("gptq").plan, num_workers=64, clock=clock)
    busy = {number: Doing(calls=(("capture", 1.0),), compiling=number % 2) for number in range(40)}
    view.hear(busy | {number: Doing(calls=(("solve", 1.0),)) for number in range(40, 63)})
    [line] = shown(view, 80)[2:]
    assert line == "64 workers  capture 40 · solve 23 · starting 1 · of which 20 compile"


def test_a_resumed_run_counts_what_was_there_and_times_only_what_is_made(
    view: RunView, clock: Clock
) -> None:
    view.report(Step(event="resumed", parts=(0, 1), text="2 of 4 parts were committed before"))
    text = "\n".join(shown(view, 80))
    assert "2/4 parts" in text
    assert "a block" not in text.replace("after a block", "")
    assert "committed before: 2" in text
    committed(view, clock, 2, 14.0)
    # A first block with its compiling took twice what the model says, and so will the last one.
    assert "14 s a block · about 4.0 s left" in "\n".join(shown(view, 80))


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_broken_however_narrow_a_terminal_is(view: RunView, width: int) -> None:
    view.hear({0: Doing(calls=(("solve_slices", 1.0),)), 1: Doing()})
    assert len(shown(view, width)) == 4
    assert max(map(len, shown(view, width))) <= width


def test_when_all_parts_are_there_the_end_is_named(view: RunView, clock: Clock) -> None:
    for part in range(4):
        committed(view, clock, part, 1.0)
    assert shown(view, 80)[1].startswith("reads all files once more, then seals")
