"""What a pass takes beside what its runs' logs tell, from the nights before."""

from __future__ import annotations

import dataclasses
import datetime
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.fleet.nights import Clock, Night, NightEntry, read_nights, save_night
from jobs.fleet.past_nights import PastNights
from pipeline.planning.machines import known_machines
from pipeline.planning.run_cost import STAGES, UNTIMED, Correction, RunCost, StageCost
from pipeline.storage.object_store import open_store

SECONDS = st.floats(min_value=0.1, max_value=1e5)
ENTRY = NightEntry(
    model="a", recipe="int8", request_id="", result="published", reasons=("never run",), text=""
)


def made(seconds: float, driven: float, model: str = "a") -> NightEntry:
    return dataclasses.replace(ENTRY, model=model, seconds=seconds, driven_seconds=driven)


def night(seconds: float, *entries: NightEntry) -> Night:
    began = Clock(datetime.datetime(2026, 11, 3, 2, 15, tzinfo=datetime.UTC))
    return dataclasses.replace(began.night("team.yaml", 9, entries), seconds=seconds)


def test_what_is_around_a_run_and_outside_of_all_is_told_apart() -> None:
    nights = [
        night(100.0, made(30.0, 20.0), made(50.0, 45.0, "b")),
        night(90.0, made(42.0, 30.0), made(40.0, 36.0, "b")),
        night(500.0, ENTRY, made(60.0, 46.0, "b")),  # one that failed took nobody knows how long
    ]
    past = PastNights(nights)
    assert past.around_seconds("a", "int8") == (10.0, 12.0)
    assert past.around_seconds("b", "int8") == (5.0, 4.0, 14.0)
    assert past.around_seconds("b", "int4") == ()
    assert past.outside_seconds == (20.0, 8.0)


def test_a_night_without_times_is_stored_as_older_versions_stored_it() -> None:
    root = open_store("memory://past-nights")
    for one in (night(9.0, ENTRY), night(9.5, made(3.0, 2.0))):
        save_night(root, one)
    keys = [key for key in root.list() if b'"driven_seconds"' not in root.get(key)]
    assert len(keys) == 1
    assert {one.entries[0].around_seconds for one in read_nights(root, 9)[0]} == {None, 1.0}


def cost(seconds: dict[str, float]) -> RunCost:
    stages = tuple(
        StageCost(name=name, seconds=seconds.get(name, 0.0), hidden_seconds=0.0, bound="")
        for name in STAGES
    )
    return RunCost(machine=known_machines(None).named("H100"), workers=1, stages=stages)


@given(
    seconds=st.fixed_dictionaries(dict.fromkeys(STAGES, SECONDS)),
    factor=st.floats(min_value=0.01, max_value=100.0),
    around=st.lists(SECONDS, min_size=1, max_size=5),
)
def test_what_is_foreseen_is_what_the_past_took(
    seconds: dict[str, float], factor: float, around: list[float]
) -> None:
    model = cost(seconds)
    correction = Correction(factor=factor, corrected_by=2).with_around(model, around)
    found = model.corrected(correction)
    assert found.timed_seconds == pytest.approx(factor * model.timed_seconds)
    beside = sum(found.stage(name).seconds for name in UNTIMED)
    assert beside == pytest.approx(statistics.median(around))
    assert found.to_dict()["around_by"] == len(around)


def test_without_past_passes_nothing_around_a_run_changes() -> None:
    model = cost({"start": 6.0, "solve": 4.0, "evaluate": 3.0})
    correction = Correction(factor=2.0, corrected_by=1).with_around(model, ())
    found = model.corrected(correction)
    assert (found.stage("start").seconds, found.stage("evaluate").seconds) == (6.0, 3.0)
    assert found.stage("solve").seconds == 8.0
    assert "around_by" not in found.to_dict()
    assert model.on_kept_workers().seconds == model.seconds - 6.0
