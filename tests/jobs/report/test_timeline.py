from __future__ import annotations

import datetime
from typing import Any

import pytest

from jobs.report.timeline import read_logs, timeline
from pipeline.run.events import Event, EventName
from pipeline.storage.object_store import open_store
from tests.pipeline.executor.test_work_spans import spell

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def event(after: float, name: EventName, **values: Any) -> Event:
    return Event(time=START + datetime.timedelta(seconds=after), name=name, values=values)


KILLED = (
    event(0, "started", workers=2),
    event(5, "committed", part=0, seconds={"quantize_alone": 4.0}),
    event(9, "lost", text="worker 1"),
    event(
        12,
        "committed",
        part=1,
        seconds={"capture": 2.0, "solve": 1.0},
        work={"capture": [[0, 5.5, 1.0], [1, 5.5, 1.0]], "solve": [[1, 7, 1.0]]},
    ),
)
RESUMED = (
    event(40, "started", workers=1),
    event(41, "resumed", text="2 parts"),
    event(50, "committed", part=2, seconds={"capture": 3.0}),
    event(52, "sealed", seconds={"finalize": 0.5}),
    event(53, "summary", summary={}),
)
IDLE = (event(99, "started", workers=1), event(100, "summary", summary={}))


def test_drivers_are_told_apart_and_who_did_not_end_in_order() -> None:
    found = timeline([RESUMED, KILLED, IDLE])
    assert found.began == START
    first, second = found.sittings
    assert (first.number, first.start, first.end, first.parts) == (1, 0.0, 12.0, 2)
    assert (second.number, second.start, second.end, second.parts) == (2, 40.0, 53.0, 1)
    assert [first.finished, second.finished] == [False, True]
    assert [first.workers, second.workers] == [2, 1]
    assert [(one.mark, one.part) for one in first.moments] == [
        ("committed", 0),
        ("worker lost", None),
        ("committed", 1),
        ("stopped", None),
    ]
    assert [(one.mark, one.seconds) for one in second.moments] == [
        ("resumed", 1.0),
        ("committed", 10.0),
        ("finished", 12.0),
    ]


def test_work_is_told_by_worker_since_its_driver_began() -> None:
    first, second = timeline([RESUMED, KILLED]).sittings
    assert first.work == (
        spell("capture", 1.0, start=5.5),
        spell("capture", 1.0, start=5.5, worker=1),
        spell("solve", 1.0, start=7.0, worker=1),
    )
    assert second.work == ()


def test_stages_that_took_next_to_nothing_are_not_named() -> None:
    log = (event(0, "committed", part=0, seconds={"quantize_alone": 99.5, "read": 0.5}),)
    assert timeline([log]).shares == [("quantize alone", 0.995)]


def test_seconds_are_summed_by_part_and_stage() -> None:
    found = timeline([KILLED, RESUMED])
    assert found.seconds[1] == {"capture": 2.0, "solve": 1.0}
    assert found.seconds[None] == {"finalize": 0.5}
    assert list(found.by_stage.items()) == [
        ("capture", 5.0),
        ("quantize_alone", 4.0),
        ("solve", 1.0),
        ("finalize", 0.5),
    ]


def test_a_run_without_logs_has_no_timeline(tmp_path: Any) -> None:
    found = timeline(read_logs(open_store(str(tmp_path))))
    assert (found.began, found.sittings, found.by_stage) == (None, (), {})


@pytest.mark.parametrize("spent", ["4", None, True, [1], float("nan"), float("inf"), 10**400])
def test_a_log_that_anyone_wrote_does_no_harm(spent: object) -> None:
    work = {"solve": [[0, 1, spent], [0, spent, 1], [spent, 0, 1], spent, [0]], "read": spent}
    found = timeline(
        [
            (event(0, "committed", part="0", seconds={"solve": spent}, work=work),),
            (event(0, "sealed", work=spent),),
        ]
    )
    assert found.by_stage == {}
    assert [one.work for one in found.sittings] == [(), ()]
    assert found.sittings[0].workers is None
