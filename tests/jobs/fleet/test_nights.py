import dataclasses
import datetime

import pytest

from jobs.fleet.nights import NIGHTS_PREFIX, Clock, NightEntry, latest, read_nights, save_night
from pipeline.storage.object_store import ObjectStore, open_store

ENTRY = NightEntry(
    model="a", recipe="int8", request_id="", result="failed", reasons=("no config",), text=""
)


@pytest.fixture
def root() -> ObjectStore:
    return open_store("memory://nights")


def clock(day: int) -> Clock:
    return Clock(datetime.datetime(2026, 11, day, 2, 15, tzinfo=datetime.UTC))


def test_nights_come_back_oldest_first_and_only_the_latest(root: ObjectStore) -> None:
    nights = [clock(day).night("team.yaml", 7, [ENTRY]) for day in (9, 3, 21)]
    for night in nights:
        save_night(root, night)
    assert read_nights(root, 10) == ((nights[1], nights[0], nights[2]), 0)
    assert read_nights(root, 1) == ((nights[2],), 0)
    assert nights[0].entries == (ENTRY,)


def test_a_night_with_nothing_to_do_leaves_nothing(root: ObjectStore) -> None:
    before = root.list()
    save_night(root, clock(4).night("team.yaml", 7, []))
    assert root.list() == before


def test_damaged_nights_are_counted_and_left_out(root: ObjectStore) -> None:
    before, _ = read_nights(root, 10)
    root.put(f"{NIGHTS_PREFIX}20261231T000000-00.json", b"{}")
    root.put(f"{NIGHTS_PREFIX}20261231T000000-01.json", b"\xff")
    assert read_nights(root, 10) == (before, 2)


def test_what_ended_last_counts_not_what_only_found_another_at_work() -> None:
    failed = clock(2).night("team.yaml", 1, [ENTRY])
    beside = clock(2).night("team.yaml", 1, [dataclasses.replace(ENTRY, result="elsewhere")])
    failed = dataclasses.replace(failed, seconds=3600.0)
    beside = dataclasses.replace(beside, began="2026-11-02T02:20:00+00:00", seconds=5.0)
    assert latest([failed, beside]) == {("a", "int8"): (failed, ENTRY)}


def test_a_night_without_a_sensible_time_is_damaged(root: ObjectStore) -> None:
    before = read_nights(root, 10)[1]
    for changed in ({"seconds": 1e300}, {"began": "2026-12-31T00:00:00"}, {"began": "yesterday"}):
        night = dataclasses.replace(clock(4).night("team.yaml", 1, [ENTRY]), **changed)
        key = f"{NIGHTS_PREFIX}20261231T000000-{len(root.list())}.json"
        root.put(key, night.to_json())
    assert read_nights(root, 10)[1] == before + 3
