"""Make one run's artifact whole, from wherever storage says that it stands."""

from __future__ import annotations

import logging
import time

from jobs.admission import check_identity, check_memory
from jobs.catalog.request import Request
from jobs.fleet.workplace import Workplace
from jobs.logging import log_event, status
from jobs.metrics import RunMetrics
from jobs.progress import watch
from jobs.summary import Summary
from pipeline.errors import CalibrationTextError, DamagedObjectError, MissingObjectError
from pipeline.estimates import estimate
from pipeline.executor.protocol import Executor
from pipeline.fidelity import Fidelity
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.remote_planning import evaluation_windows, identity, measure, plan_run
from pipeline.run.commits import Finding, damaged_files, quarantine, read_manifest
from pipeline.run.driver import quantize
from pipeline.run.events import EventLog
from pipeline.run.lease import Lease
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.object_store import ObjectStore


def whole_manifest(store: ObjectStore) -> tuple[Manifest | None, tuple[Finding, ...]]:
    """A run's manifest if all that it names was read and is as it says; else what is not."""
    try:
        manifest = read_manifest(store)
    except MissingObjectError:
        return None, ()
    except DamagedObjectError as error:
        return None, (Finding(key=MANIFEST_KEY, problem=str(error), is_damaged=True),)
    damaged = damaged_files(store, manifest)
    return (None, damaged) if damaged else (manifest, ())


def plan_of(
    request: Request, store: ObjectStore, executor: Executor, place: Workplace
) -> tuple[Plan, bytes | None]:
    """The plan that the run was begun with, or else a new one and its token windows.

    Only a new one reads the whole source; parts are checked against either when they are read.

    Raises:
        PipelineError: it cannot be carried out here.
    """
    if store.exists(PLAN_KEY):
        plan = read_plan(store)
        found = identity(executor, request.source_url, place.resources.threads)
        check_identity(plan, found, request.source_url, finished=False)
        return plan, None
    recipe = recipe_from_dict(request.recipe, where=request.request_id)
    return plan_run(executor, request.source_url, recipe, place.resources.threads)


def carry_out(
    plan: Plan,
    store: ObjectStore,
    executor: Executor,
    place: Workplace,
    held: Lease,
    damaged: tuple[Finding, ...],
    metrics: RunMetrics,
) -> Manifest:
    """Make what is missing or damaged of a claimed run.

    Args:
        held: the run's lease.
        damaged: what was found so; it is moved aside, and made again.

    Raises:
        PipelineError: with what to do about it.
    """
    start = time.monotonic()
    costs = estimate(plan, place.resources.workers)
    check_memory(costs, place.nodes)
    log = EventLog(store, plan, place.resources, epoch=held.epoch)
    for finding in damaged:
        log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
    held.check()
    quarantine(store, damaged)
    with watch(plan) as report:
        manifest = quantize(
            plan, store, executor, metrics.also(log.also(report)), check_lease=held.check
        )
    seconds = time.monotonic() - start
    summary = Summary.of(
        plan, store, manifest, costs, log.seconds, wall_seconds=seconds, fidelity=None
    )
    log.close(summary.to_dict())
    return manifest


def evaluated(request: Request, plan: Plan, executor: Executor) -> Fidelity:
    """Compare a finished result with its source, on the texts that the request names.

    Raises:
        CalibrationTextError: texts that are missing, unreadable or too few.
    """
    num_windows = request.evaluation_windows
    with status("comparing the result with its source"):
        try:
            windows = evaluation_windows(
                executor, request.source_url, plan, request.evaluation_texts, num_windows
            )
        except CalibrationTextError as error:
            raise CalibrationTextError(
                f"evaluate_on, with {num_windows} windows: {error}"
            ) from None
        return measure(executor, windows, num_windows)
