from __future__ import annotations

from typing import Any

from jobs.report import time_figures
from jobs.report.time_figures import stages_figure, workers_figure
from jobs.report.timeline import timeline
from pipeline.executor.protocol import group_of
from pipeline.run.worker_api import WorkerApi
from tests.jobs.report.test_timeline import KILLED, RESUMED, event

NAMES = ("rest", "block_0", "block_1")
METHODS = tuple(name for name in vars(WorkerApi) if not name.startswith("_"))


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert set(time_figures._COLORS) <= {*METHODS, "other"}
    assert len(set(time_figures._COLORS.values())) == len(time_figures._COLORS)


def test_what_happened_and_who_worked_is_drawn_by_driver() -> None:
    found = workers_figure(timeline([KILLED, RESUMED]), NAMES)
    assert found is not None
    bars, spans, marks = (one["data"]["values"] for one in found.spec["layer"])
    labels = ["driver 1", "worker 0", "worker 1", "driver 2"]
    assert found.spec["encoding"]["y"]["axis"]["labelExpr"] == f"{labels}[datum.value]"
    assert [(one["row"], one["ending"]) for one in bars] == [(0, "stopped"), (3, "ended in order")]
    assert [(s["row"], s["stage"], s["start"], s["end"]) for s in spans] == [
        (1, "capture", 5.5, 6.5),
        (2, "capture", 5.5, 6.5),
        (2, "solve", 7.0, 8.0),
    ]
    assert [(one["row"], one["what"], one["part"]) for one in marks] == [
        (0, "committed", "rest"),
        (0, "worker lost", None),
        (0, "committed", "block_0"),
        (0, "stopped", None),
        (3, "resumed", None),
        (3, "committed", "block_1"),
        (3, "finished", None),
    ]


def test_a_driver_that_tells_nothing_new_is_not_drawn() -> None:
    assert workers_figure(timeline([RESUMED[:1] + RESUMED[2:]]), NAMES) is None
    assert workers_figure(timeline([]), NAMES) is None


def test_what_waits_for_storage_is_drawn_beside_what_computes() -> None:
    work = {name: [[0, i, 1.0]] for i, name in enumerate(METHODS) if name in time_figures._COLORS}
    found = workers_figure(timeline([(event(0, "committed", part=0, work=work),)]), NAMES)
    assert found is not None
    beside = {
        span["stage"].replace(" ", "_")
        for layer in found.spec["layer"]
        if layer["mark"].get("height") == 3
        for span in layer["data"]["values"]
    }
    assert beside == {name for name in work if group_of(getattr(WorkerApi, name))}
    assert len(beside) >= 3


def test_a_picture_of_many_workers_stays_small_and_says_what_it_leaves_out() -> None:
    work: dict[str, Any] = {
        stage: [
            [worker, 2 * i + (stage == "solve"), 0.5] for worker in range(100) for i in range(90)
        ]
        for stage in ("capture", "solve")
    }
    found = workers_figure(timeline([(event(0, "committed", part=0, work=work),)]), NAMES)
    assert found is not None
    assert "61 more workers are not shown" in found.caption
    drawn = sum(len(one["data"]["values"]) for one in found.spec["layer"])
    assert 2 * 39 <= drawn <= 3010


def test_stages_are_stacked_by_part() -> None:
    found = stages_figure(timeline([KILLED, RESUMED]), NAMES)
    assert found is not None
    assert [(v["name"], v["stage"], v["time"]) for v in found.spec["data"]["values"]] == [
        ("rest", "quantize alone", 4.0),
        ("block_0", "capture", 2.0),
        ("block_0", "solve", 1.0),
        ("block_1", "capture", 3.0),
    ]
    assert found.spec["encoding"]["x"]["scale"]["domain"] == [0, 1, 2]
    assert stages_figure(timeline([]), NAMES) is None


def test_long_times_are_told_in_larger_units() -> None:
    found = stages_figure(
        timeline([(event(0, "committed", part=0, seconds={"solve": 7200.0}),)]), NAMES
    )
    assert found is not None
    assert found.spec["encoding"]["y"]["title"] == "minutes of work"
    assert [v["time"] for v in found.spec["data"]["values"]] == [120.0]


def test_a_stage_that_is_none_is_told_as_other_and_its_name_stays_outside() -> None:
    hostile = '"];alert(1)//'
    log = (event(0, "committed", part=0, seconds={hostile: 1.0}, work={hostile: [[0, 0, 1]]}),)
    for found in (stages_figure(timeline([log]), NAMES), workers_figure(timeline([log]), NAMES)):
        assert found is not None
        assert hostile not in str(found.spec)
        assert "other" in str(found.spec)
