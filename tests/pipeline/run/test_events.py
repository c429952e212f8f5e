import datetime
import json

import pytest

from pipeline.executor.protocol import Allocation
from pipeline.run.events import (
    EVENTS_PREFIX,
    EventLog,
    Step,
    StepEvent,
    read_events,
    read_totals,
)
from pipeline.run.records import PartRecord, file_key
from pipeline.storage.memory_store import MemoryBackend
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.executor.test_work_spans import spell
from tests.pipeline.tiny_runs import planned

_fresh = iter(range(1_000_000))


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://test-events/{next(_fresh)}")


def lines(store: ObjectStore) -> list[dict[str, object]]:
    [key] = store.list("events/")
    assert key.endswith(".jsonl")
    return [json.loads(line) for line in store.get(key).decode().splitlines()]


def record(part: int) -> PartRecord:
    return PartRecord(
        part=part,
        plan_digest="0" * 64,
        file=file_key(part),
        sha256="1" * 64,
        size_bytes=12,
        loaded_bytes=24,
    )


def test_events_are_stored_as_soon_as_a_part_is_committed(store: ObjectStore) -> None:
    told: list[Step] = []
    log = EventLog(store, planned("int8").plan, Allocation(workers=2, threads=3))
    report = log.also(told.append)
    assert store.list() == ()
    step = Step(event="committed", part=1, record=record(1), work=[spell("solve", 1.5)])
    report(step)
    assert told == [step]
    started, committed = lines(store)
    assert started["event"] == "started"
    assert (started["workers"], started["threads"]) == (2, 3)
    assert committed["event"] == "committed"
    assert committed["part"] == 1
    assert committed["size_bytes"] == 12
    assert committed["seconds"] == {"solve": 1.5}
    assert str(started["time"]) <= str(committed["time"])


def test_seconds_add_up_by_stage(store: ObjectStore) -> None:
    log = EventLog(store, planned("int8").plan, Allocation(workers=1, threads=1))
    report = log.also(lambda step: None)
    report(
        Step(
            event="committed",
            part=0,
            record=record(0),
            work=[spell("solve", 1.0), spell("read", 2.0)],
        )
    )
    report(Step(event="sealed", work=[spell("solve", 0.5), spell("finalize", 0.25)]))
    assert dict(log.seconds) == {"solve": 1.5, "read": 2.0, "finalize": 0.25}
    log.close({"flops": 1.0})
    assert [line["event"] for line in lines(store)] == [
        "started",
        "committed",
        "sealed",
        "summary",
        "totals",
    ]


def test_every_driver_writes_a_file_of_its_own(store: ObjectStore) -> None:
    for _ in range(5):
        EventLog(store, planned("int8").plan, Allocation(workers=1, threads=1)).close({})
    assert len(store.list("events/")) == 5


def test_the_log_says_who_worked_when_by_its_own_start(store: ObjectStore) -> None:
    log = EventLog(store, planned("int8").plan, Allocation(workers=2, threads=1))
    [started] = [json.loads(line) for line in log._lines]
    began = datetime.datetime.fromisoformat(started["time"]).timestamp()
    report = log.also(lambda step: None)
    report(
        Step(
            event="committed",
            part=0,
            work=[
                spell("solve", 2.0, start=began + 1),
                spell("solve", 1.0, start=began + 5, worker=1),
            ],
        )
    )
    log.close({}, [spell("evaluate", 3.0, start=began + 9)])
    _, committed, summary = lines(store)
    assert committed["work"] == {
        "solve": [[0, pytest.approx(1.0, abs=0.01), 2.0], [1, pytest.approx(5.0, abs=0.01), 1.0]]
    }
    assert summary["work"] == {"evaluate": [[0, pytest.approx(9.0, abs=0.01), 3.0]]}
    assert all("work=" not in event.line() for event in read_events(store))


class ReadByRange(MemoryBackend):
    """A store that counts the bytes that are read, and gives no object whole."""

    num_bytes = 0

    def read(self, key: str, num_bytes: int | None) -> bytes:
        raise AssertionError(f"{key} is read whole")

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        found = self._find(key)[0][start:stop]
        self.num_bytes += len(found)
        return found


def test_totals_are_read_from_the_end_of_a_long_log(store: ObjectStore) -> None:
    log = EventLog(store, planned("int8").plan, Allocation(workers=2, threads=3))
    report = log.also(lambda step: None)
    work = [spell("solve", 2.0)]
    for part in range(20):
        report(Step(event="committed", part=part, work=work, text="long" * 10_000))
    assert read_totals(store) is None  # it is not finished
    report(Step(event="sealed"))
    log.captured(0.25)
    log.close({"text": "long" * 10_000})
    [key] = store.list(EVENTS_PREFIX)
    assert store.size(key) > 500_000
    backend = ReadByRange(store.root_url.removeprefix("memory://"))
    totals = read_totals(ObjectStore(store.root_url, backend))
    assert backend.num_bytes <= 64 << 10
    assert totals is not None
    times = {event.name: event.time for event in read_events(store)}
    passed = (times["sealed"] - times["started"]).total_seconds()
    assert totals.seconds + totals.captured_seconds == pytest.approx(passed, abs=0.002)
    assert totals.captured_seconds == 0.25
    assert totals.work_seconds == pytest.approx({"solve": 40.0})
    assert totals.allocation == {"workers": 2, "threads": 3, "gpus": 0}
    assert totals.is_whole


@pytest.mark.parametrize("mishap", ["resumed", "damaged", "lost", "fewer"])
def test_totals_tell_a_run_with_a_mishap(store: ObjectStore, mishap: StepEvent) -> None:
    log = EventLog(store, planned("int8").plan, Allocation(workers=1, threads=1))
    report = log.also(lambda step: None)
    events: tuple[StepEvent, ...] = ("committed", mishap, "sealed")
    for event in events:
        report(Step(event=event, part=0))
    log.close({})
    totals = read_totals(store)
    assert totals is not None
    assert not totals.is_whole
