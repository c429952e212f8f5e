"""`quantfleet quantize` and `resume`: one model × one recipe, from the plan to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.admission import check_identity, check_memory
from jobs.computing import computing
from jobs.logging import is_json, log_event, print_json, set_run, status, url_name
from jobs.metrics import RunMetrics
from jobs.plan_table import plan_table
from jobs.progress import watch
from jobs.reachable import reachable
from jobs.summary import Summary, summary_table
from jobs.termination import Terminated
from pipeline.errors import CalibrationTextError, PipelineError
from pipeline.estimates import Estimate, estimate
from pipeline.executor.protocol import Executor
from pipeline.executor.ray_cluster import Resources, memory_of_nodes
from pipeline.executor.ray_executor import RayExecutor
from pipeline.fidelity import Fidelity
from pipeline.model.preset import PRESET_KEY, check_preset
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import (
    claim_run,
    evaluation_windows,
    identity,
    measure,
    plan_run,
)
from pipeline.run import lease
from pipeline.run.commits import read_manifest
from pipeline.run.driver import quantize
from pipeline.run.events import EventLog
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run computes.

    Attributes:
        address: of a Ray cluster; None starts one on this machine.
        workers, threads: None lets the cluster decide.
        device: "auto", "cpu" or "gpu".
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Driving:
    """How a run is driven; none of it changes its result.

    Attributes:
        keep_every: blocks between activations kept in storage, to resume from.
        wait: for another driver of the same run to end, rather than give up.
        lease_seconds: silence after which another driver is taken to be dead.
    """

    keep_every: int = 8
    wait: bool = True
    lease_seconds: float = lease.TERM_SECONDS


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to quantize, how, and where to put it."""

    source_url: str
    recipe: Recipe
    output_url: str
    evaluation_texts: tuple[str, ...] = ()
    evaluation_windows: int = 8
    driving: Driving = Driving()


def run_job(job: Job, place: Place, *, as_json: bool, dry_run: bool) -> None:
    """Plan, claim, quantize, evaluate and report.

    Raises:
        PipelineError: with what to do about it.
    """
    job = dataclasses.replace(
        job, source_url=_anywhere(job.source_url), output_url=_anywhere(job.output_url)
    )
    set_run(run=url_name(job.output_url), model=url_name(job.source_url), recipe=job.recipe.name)
    # Before anything else: an output that cannot be read cannot be written either.
    store = reachable(job.output_url, PLAN_KEY)
    check_preset(reachable(job.source_url, PRESET_KEY))
    with _place(place) as resources:
        wanted = dataclasses.replace(resources, workers=1) if dry_run else resources
        executor = RayExecutor(wanted, job.source_url, job.output_url)
        with status("planning: reading the preset, checking every layer, cutting texts"):
            plan, windows = plan_run(executor, job.source_url, job.recipe, resources.threads)
        costs = estimate(plan, resources.workers)
        if dry_run:
            _print_plan(plan, costs, resources, as_json=as_json)
        if not store.exists(MANIFEST_KEY):
            check_memory(costs, memory_of_nodes(resources))
        if dry_run:
            return
        # Also read before anything is claimed: a mistyped file must not cost a run.
        judged_on = _evaluation_windows(job, plan, executor)
        plan = claim_run(store, plan, windows)
        _carry_out(plan, job, store, executor, resources, costs, judged_on, as_json=as_json)


def resume_job(
    output_url: str,
    place: Place,
    *,
    as_json: bool,
    source_url: str | None,
    driving: Driving,
    evaluation_texts: tuple[str, ...] = (),
    evaluation_windows: int = 8,
    must_be_finished: bool = False,
) -> None:
    """Go on with the run at `output_url`, as its plan says.

    Raises:
        PipelineError: there is no run, or its source is not what it was.
    """
    output_url = _anywhere(output_url)
    source_url = None if source_url is None else _anywhere(source_url)
    set_run(run=url_name(output_url))
    store = reachable(output_url, PLAN_KEY)
    if not store.exists(PLAN_KEY):
        raise PipelineError(
            f"{store.url(PLAN_KEY)} is missing: no run was started there; start one with "
            "quantfleet quantize"
        )
    if must_be_finished and not store.exists(MANIFEST_KEY):
        raise PipelineError(
            f"{store.url(MANIFEST_KEY)} is missing: the run is not finished; finish it with "
            f"quantfleet resume {shlex.quote(output_url)}"
        )
    plan = read_plan(store)
    url = source_url or plan.source_url
    set_run(run=url_name(output_url), model=url_name(url), recipe=plan.recipe.name)
    finished = store.exists(MANIFEST_KEY)
    if finished and not evaluation_texts:
        log_event("finished before", f"{output_url}: finished before; nothing to do")
        costs = estimate(plan, 1)
        summary = Summary.of(
            plan, store, read_manifest(store), costs, {}, wall_seconds=0.0, fidelity=None
        )
        _print_summary(summary, store, as_json=as_json)
        return
    check_preset(reachable(url, PRESET_KEY))
    wanted = dataclasses.replace(place, threads=place.threads or int(plan.machine["threads"]))
    with _place(wanted) as resources:
        executor = RayExecutor(resources, url, output_url)
        with status("checking that source and machine are what they were"):
            found = identity(executor, url, resources.threads)
        check_identity(plan, found, url, finished=finished)
        job = Job(
            source_url=url,
            recipe=plan.recipe,
            output_url=output_url,
            evaluation_texts=evaluation_texts,
            evaluation_windows=evaluation_windows,
            driving=driving,
        )
        costs = estimate(plan, resources.workers)
        check_memory(costs, memory_of_nodes(resources))
        judged_on = _evaluation_windows(job, plan, executor)
        _carry_out(plan, job, store, executor, resources, costs, judged_on, as_json=as_json)


def _carry_out(
    plan: Plan,
    job: Job,
    store: ObjectStore,
    executor: Executor,
    resources: Resources,
    costs: Estimate,
    judged_on: bytes | None,
    *,
    as_json: bool,
) -> None:
    start = time.monotonic()
    fidelity: Fidelity | None = None
    metrics = RunMetrics(model=url_name(job.source_url), recipe=plan.recipe.name)
    try:
        with _lease(job, store) as held:
            log = EventLog(store, plan, resources, epoch=held.epoch if held else None)
            if held is None:
                log_event("finished before", f"{job.output_url}: finished before; nothing to do")
            else:
                with watch(plan) as report:
                    quantize(
                        plan,
                        store,
                        executor,
                        metrics.also(log.also(report)),
                        keep_every=job.driving.keep_every,
                        check_lease=held.check,
                    )
        manifest = read_manifest(store)
        seconds = time.monotonic() - start
        if judged_on is not None:
            with status("comparing the result with its source"):
                fidelity = measure(executor, judged_on, job.evaluation_windows)
            metrics.judged(fidelity)
        if held is not None:  # or there was nothing to do
            metrics.ended("finished")
    except (PipelineError, KeyboardInterrupt, Terminated) as end:
        metrics.ended("failed" if isinstance(end, PipelineError) else "interrupted")
        log_event("resumable", f"to go on from the last committed block: {resume_command(job)}")
        raise
    summary = Summary.of(
        plan, store, manifest, costs, log.seconds, wall_seconds=seconds, fidelity=fidelity
    )
    log.close(summary.to_dict())
    _print_summary(summary, store, as_json=as_json)


@contextlib.contextmanager
def _lease(job: Job, store: ObjectStore) -> Iterator[lease.Lease | None]:
    """The right to drive the run for the time of the block; None if it is finished."""
    if store.exists(MANIFEST_KEY):
        yield None
        return
    driving = job.driving
    with lease.acquire(
        store,
        seconds=driving.lease_seconds,
        wait=driving.wait,
        tell=lambda text: log_event("waiting", text),
    ) as held:
        # The driver that this one waited for may have finished.
        yield None if store.exists(MANIFEST_KEY) else held


def _print_summary(summary: Summary, store: ObjectStore, *, as_json: bool) -> None:
    if as_json:
        print_json(summary.to_dict())
    if not as_json or is_json():
        values = {"summary": summary.to_dict()}
        log_event("finished", "", values, table=summary_table(summary))
        log_event("loadable", f"load it:  {load_hint(summary.task, store)}")


def load_hint(task: str, store: ObjectStore) -> str:
    """How stock KerasHub loads the result: it knows local folders, and no object storage."""
    url = store.url("artifact")
    local = url.removeprefix("file://")
    if "://" not in local:
        return f"keras_hub.models.{task}.from_preset({local!r})"
    return f"copy {url} to a local folder, then keras_hub.models.{task}.from_preset(folder)"


def _evaluation_windows(job: Job, plan: Plan, executor: Executor) -> bytes | None:
    if not job.evaluation_texts:
        return None
    try:
        return evaluation_windows(
            executor, job.source_url, plan, job.evaluation_texts, job.evaluation_windows
        )
    except CalibrationTextError as error:
        raise CalibrationTextError(
            f"--evaluate-on, with --windows {job.evaluation_windows}: {error}"
        ) from None


def _anywhere(url: str) -> str:
    """A local path as any process of this machine finds it; URLs as they are."""
    is_local = bool(url) and "://" not in url
    # Storage URLs hold no "..".
    return os.path.normpath(Path(url).expanduser().absolute()) if is_local else url


def resume_command(job: Job) -> str:
    """The command that goes on with a run."""
    return f"quantfleet resume {shlex.quote(job.output_url)}"


@contextlib.contextmanager
def _place(place: Place) -> Iterator[Resources]:
    with computing(place.address, place.workers, place.threads, device=place.device) as resources:
        on = "one GPU each" if resources.gpus else "CPU"
        why = "" if resources.gpus or place.device == "cpu" else " (the cluster has no GPU)"
        log_event(
            "joined",
            f"{resources.workers} worker(s) × {resources.threads} thread(s) on {on}{why}, "
            f"{place.address or 'a Ray cluster started on this machine'}",
            dataclasses.asdict(resources),
        )
        yield resources


def _print_plan(plan: Plan, costs: Estimate, resources: Resources, *, as_json: bool) -> None:
    if as_json:
        described: dict[str, Any] = {
            "plan_digest": plan.digest,
            "plan": dataclasses.asdict(plan),
            "estimate": dataclasses.asdict(costs) | {"flops": costs.flops},
            "resources": dataclasses.asdict(resources),
        }
        print_json(described)
    else:
        log_event(
            "planned",
            "",
            {
                "plan_digest": plan.digest,
                "estimate": dataclasses.asdict(costs) | {"flops": costs.flops},
            },
            table=plan_table(plan, costs, resources),
        )
