"""Schedules on paper: never more workers than there are, by priority, none idle that is wanted."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.fleet.schedule import schedule_json, schedule_table
from jobs.fleet.simulation import Failures, Schedule, SimulatedRun, simulate

WORKERS = 8


@st.composite
def catalogs(draw: st.DrawFn) -> list[SimulatedRun]:
    number = draw(st.integers(1, 25))
    return [
        SimulatedRun(
            name=f"run {i}",
            workers=draw(st.integers(1, WORKERS)),
            seconds=draw(st.integers(1, 50)),
            priority=draw(st.integers(-2, 2)),
            lost_seconds=3.0,
        )
        for i in range(number)
    ]


def made_at(schedule: Schedule, time: float) -> list[SimulatedRun]:
    return [one.run for one in schedule.entries if one.start <= time < one.end]


AT_ONCE = st.none() | st.integers(1, 4)
FAILURES = st.none() | st.builds(
    Failures, mean_seconds=st.sampled_from([20.0, 200.0]), seed=st.integers(0, 9)
)


@given(catalogs(), AT_ONCE, FAILURES)
def test_workers_suffice_and_none_is_idle_that_a_waiting_run_would_take(
    runs: list[SimulatedRun], at_once: int | None, failures: Failures | None
) -> None:
    schedule = simulate(runs, WORKERS, at_once=at_once, failures=failures)
    assert sorted(one.run.name for one in schedule.entries) == sorted(run.name for run in runs)
    order = {run.name: (-run.priority, number) for number, run in enumerate(runs)}
    for time in {one.start for one in schedule.entries} | {one.end for one in schedule.entries}:
        held = made_at(schedule, time)
        free = WORKERS - sum(run.workers for run in held)
        assert free >= 0
        assert at_once is None or len(held) <= at_once
        waiting = [one.run for one in schedule.entries if one.start > time]
        # Those that are started wait for workers; the others wait for one of them to end.
        waiting.sort(key=lambda run: order[run.name])
        room = len(runs) if at_once is None else at_once - len(held)
        assert all(run.workers > free for run in waiting[:room])
        # What starts now is more urgent than all that would have fitted in its place.
        for one in schedule.entries:
            if one.start == time:
                passed = [run for run in waiting if run.workers <= one.run.workers]
                assert all(order[one.run.name] < order[run.name] for run in passed)


@given(catalogs(), FAILURES)
def test_a_schedule_takes_no_less_than_its_work_and_no_more_than_one_after_another(
    runs: list[SimulatedRun], failures: Failures | None
) -> None:
    schedule = simulate(runs, WORKERS, failures=failures)
    for one in schedule.entries:
        lasted = one.run.seconds + one.failures * one.run.lost_seconds
        assert one.end - one.start == pytest.approx(lasted)
    assert schedule.makespan >= schedule.worker_seconds / WORKERS - 1e-9
    assert schedule.makespan <= sum(one.end - one.start for one in schedule.entries) + 1e-9
    assert 0 < schedule.utilisation <= 1 + 1e-9
    alone = simulate(runs, WORKERS, at_once=1, failures=failures)
    assert alone.makespan == pytest.approx(sum(one.end - one.start for one in schedule.entries))
    assert alone.failures == schedule.failures


@given(catalogs())
def test_what_waits_names_the_run_that_it_waited_for(runs: list[SimulatedRun]) -> None:
    schedule = simulate(runs, WORKERS)
    ends = {one.run.name: one.end for one in schedule.entries}
    for one in schedule.entries:
        assert (one.after == "") == (one.start == 0)
        assert not one.after or ends[one.after] == one.start


def test_failures_are_as_many_as_workers_and_hours_make_and_the_same_for_a_seed() -> None:
    runs = [SimulatedRun(name=str(i), workers=4, seconds=3600.0) for i in range(1000)]
    of_seeds = [
        simulate(runs, 64, failures=Failures(mean_seconds=36_000.0, seed=seed)).failures
        for seed in (1, 1, 2)
    ]
    assert of_seeds[0] == of_seeds[1] != of_seeds[2]
    expected = 1000 * 4 * 3600 / 36_000
    assert all(abs(found - expected) < 4 * math.sqrt(expected) for found in of_seeds)


def test_a_run_that_fails_faster_than_it_works_is_said_not_to_end() -> None:
    seconds = {"fast": 0.001, "slow": 1000.0}
    runs = [SimulatedRun(name=n, workers=1, seconds=s, lost_seconds=60) for n, s in seconds.items()]
    schedule = simulate(runs, 2, failures=Failures(mean_seconds=50.0))
    found = {one["name"]: one for one in schedule_json(schedule)["runs"]}
    assert {name: one.get("never_ends") for name, one in found.items()} == {
        "fast": None,
        "slow": True,
    }
    told = io.StringIO()
    Console(width=200, file=told).print(schedule_table(schedule, "H100"))
    assert f"≥ {found['slow']['failures']}" in told.getvalue()
    assert "1 run(s) fail faster than they work" in told.getvalue()
