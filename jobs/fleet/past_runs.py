"""What finished runs say of the cost model: measured over predicted, on machines of one kind."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from jobs.catalog.request import Request, run_store
from jobs.publish.releases import history
from jobs.run_costs import Workers, cost_of
from pipeline.errors import PipelineError
from pipeline.plan import read_plan
from pipeline.planning.run_cost import Correction
from pipeline.run.events import EVENTS_PREFIX, Event, read_events
from pipeline.storage.object_store import ObjectStore

_MOST_RUNS = 5


def correction(root: ObjectStore, request: Request, workers: Workers) -> Correction | None:
    """What the latest runs that were published under a request's name say; None without any.

    Counted are those that one driver made from their beginning to their end, on machines such as
    the workers'. The median of the ratios is taken, which one run on a busy machine does not move.

    Raises:
        StorageError: the store cannot be used.
    """
    runs = dict.fromkeys(
        release.run_id for release in reversed(history(root, request.model, request.recipe_name))
    )
    ratios = [
        ratio
        for run_id in list(runs)[:_MOST_RUNS]
        for ratio in _ratios(run_store(root, run_id), workers)
    ]
    if not ratios:
        return None
    return Correction(factor=statistics.median(ratios), corrected_by=len(ratios))


def _ratios(store: ObjectStore, workers: Workers) -> Iterator[float]:
    """Of a run: what it took over what the model says; nothing where that cannot be told."""
    for key in store.list(EVENTS_PREFIX):  # of each driver
        events = read_events(store, [key])
        seconds = _seconds(events)
        there = _workers_of(events, workers)
        if seconds is None or there is None:
            continue
        try:
            plan = read_plan(store)
        except PipelineError:
            return  # swept, or of a version that this one does not read: it says nothing
        predicted = cost_of(plan, there, num_windows=0).timed_seconds
        if predicted > 0:
            yield seconds / predicted
        return


def _seconds(events: tuple[Event, ...]) -> float | None:
    """From the claim to the manifest, of a driver that made all of a run without a mishap."""
    names = [event.name for event in events]
    if not {"started", "committed", "sealed"} <= set(names):
        return None
    if {"resumed", "damaged", "lost", "fewer"} & set(names):
        return None
    ended = events[names.index("sealed")].time
    return (ended - events[names.index("started")].time).total_seconds() or None


def _workers_of(events: tuple[Event, ...], workers: Workers) -> Workers | None:
    """The workers that a run had, if they were machines such as these."""
    started = next((event.values for event in events if event.name == "started"), {})
    number, gpus, threads = (started.get(name) for name in ("workers", "gpus", "threads"))
    machine = workers.machine
    if not isinstance(number, int) or not isinstance(gpus, int):
        return None
    if machine.device == "gpu":
        kind = str(started.get("accelerator", ""))
        return (
            Workers(number=number * gpus, machine=machine, together=gpus)
            if gpus and kind.lower() == machine.name.lower()
            else None
        )
    same = not gpus and threads == machine.host_threads
    return Workers(number=number, machine=machine) if same else None
