"""What finished runs say of the cost model: measured over predicted, on machines of one kind."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable

from jobs.catalog.request import Request, run_store
from jobs.publish.releases import newest_first
from jobs.run_costs import Workers, cost_of
from pipeline.errors import PipelineError
from pipeline.plan import read_plan
from pipeline.planning.run_cost import Correction
from pipeline.run.events import RunTotals, read_totals
from pipeline.storage.object_store import ObjectStore

_MOST_RUNS = 5
_MOST_RELEASES = 20
"""To find them among: a run that was judged again is released again."""


def correction(root: ObjectStore, request: Request, workers: Workers) -> Correction | None:
    """What the latest runs that were published under a request's name say; None without any.

    Counted are those that one driver made from their beginning to their end, on machines such as
    the workers'. The median of the ratios is taken, which one run on a busy machine does not move.
    Of each run two small objects and the plan are read.

    Raises:
        StorageError: the store cannot be used.
    """
    ratios = [
        ratio
        for run_id in _latest_runs(root, request)
        if (ratio := _ratio(run_store(root, run_id), workers)) is not None
    ]
    if not ratios:
        return None
    return Correction(factor=statistics.median(ratios), corrected_by=len(ratios))


def _latest_runs(root: ObjectStore, request: Request) -> Iterable[str]:
    """The runs of the newest releases, each once."""
    found = newest_first(root, request.model, request.recipe_name)
    runs = dict.fromkeys(one.run_id for one in itertools.islice(found, _MOST_RELEASES))
    return itertools.islice(runs, _MOST_RUNS)


def _ratio(store: ObjectStore, workers: Workers) -> float | None:
    """Of a run: what it took over what the model says; None where that cannot be told.

    Statistics that it uses were made by another run, or in time that its log tells apart. So
    neither counts them.
    """
    totals = read_totals(store)
    if totals is None or not totals.is_whole or totals.seconds <= 0:
        return None
    there = _workers_of(totals, workers)
    if there is None:
        return None
    try:
        plan = read_plan(store)
    except PipelineError:
        return None  # swept, or of a version that this one does not read: it says nothing
    predicted = cost_of(plan, there, num_windows=0, captured=True).timed_seconds
    return totals.seconds / predicted if predicted > 0 else None


def _workers_of(totals: RunTotals, workers: Workers) -> Workers | None:
    """The workers that a run had, if they were machines such as these."""
    number, gpus, threads = (totals.allocation.get(name) for name in ("workers", "gpus", "threads"))
    machine = workers.machine
    if not isinstance(number, int) or not isinstance(gpus, int):
        return None
    if machine.device == "gpu":
        kind = str(totals.allocation.get("accelerator", ""))
        return (
            Workers(number=number * gpus, machine=machine, together=gpus)
            if gpus and kind.lower() == machine.name.lower()
            else None
        )
    same = not gpus and threads == machine.host_threads
    return Workers(number=number, machine=machine) if same else None
