"""When a catalog's runs would be made by `quantfleet submit --wait`, as a dry run shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from jobs.fleet.nightly import Outcome
from jobs.fleet.simulation import Failures, Schedule, SimulatedRun, simulate
from jobs.quantities import duration
from pipeline.planning.run_cost import RunCost

_MOST_SHOWN = 20
_LOST_PARTS = 2
"""That a failure costs at most: the block that is solved, and the one before it."""


def schedule_of(
    outcomes: Sequence[Outcome],
    workers: int,
    *,
    at_once: int | None = None,
    poll_seconds: float = 0.0,
    failures: Failures | None = None,
) -> Schedule:
    """Schedule the runs whose cost is known, on so many GPUs or nodes of CPUs (see `simulate`).

    Args:
        outcomes: in the catalog's order.
    """
    runs = [
        dataclasses.replace(simulated(one.name, one.forecast.cost, one.priority), after=one.givers)
        for one in outcomes
        if one.forecast is not None and isinstance(one.forecast.cost, RunCost)
    ]
    return simulate(runs, workers, at_once=at_once, poll_seconds=poll_seconds, failures=failures)


def simulated(name: str, cost: RunCost, priority: int = 0) -> SimulatedRun:
    """A run of this cost."""
    parts = cost.part_seconds
    lost = cost.stage("start").seconds + _LOST_PARTS * sum(parts) / max(len(parts), 1)
    return SimulatedRun(
        name=name,
        priority=priority,
        workers=cost.workers,
        seconds=cost.seconds,
        lost_seconds=lost,
    )


def schedule_json(schedule: Schedule) -> Mapping[str, Any]:
    """Plain JSON values."""
    return {
        "workers": schedule.workers,
        "seconds": schedule.makespan,
        "utilisation": schedule.utilisation,
        "mean_wait_seconds": schedule.mean_wait,
        "failures": schedule.failures,
        "runs": [
            {
                "name": one.run.name,
                "workers": one.run.workers,
                "submitted": one.submitted,
                "start": one.start,
                "end": one.end,
                "failures": one.failures,
                "after": one.after,
                **({"never_ends": True} if one.never_ends else {}),
            }
            for one in schedule.entries
        ],
    }


def schedule_table(schedule: Schedule, kind: str) -> Table:
    """The whole, and when the first runs start and end.

    Args:
        kind: what workers are, such as H100.
    """
    table = Table(
        "run",
        *(Column(name, justify="right") for name in (f"of {kind}", "starts", "ends", "failures")),
        "waits for",
        title=f"{len(schedule.entries)} runs on {schedule.workers} × {kind}: done after "
        f"{duration(schedule.makespan)}, {schedule.utilisation:.0%} of the workers' time in use",
    )
    for one in schedule.entries[:_MOST_SHOWN]:
        table.add_row(
            Text(one.run.name),
            str(one.run.workers),
            duration(one.start),
            duration(one.end),
            f"≥ {one.failures}" if one.never_ends else str(one.failures),
            Text(one.after),
        )
    told = []
    if (more := len(schedule.entries) - _MOST_SHOWN) > 0:
        told.append(f"and {more} more; --json has all")
    if endless := sum(1 for one in schedule.entries if one.never_ends):
        told.append(
            f"{endless} run(s) fail faster than they work (≥): they were followed no further, and "
            "would hardly end"
        )
    table.caption = "\n".join(told) or None
    return table
