"""`quantfleet fulfil`: one request, from wherever storage says it stands to its release."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jobs.catalog.request import Request, run_store
from jobs.evaluating import judge, read_evaluation_set
from jobs.execute import (
    Compute,
    DriverOptions,
    OpenCompute,
    check_identity,
    execute,
)
from jobs.fleet.captured_statistics import planned_on
from jobs.fleet.composed_result import compose
from jobs.fleet.intact_runs import IntactRun, find_intact, intact, read_intact
from jobs.fleet.known_quality import known_fidelity
from jobs.fleet.release_exports import release_exports
from jobs.known_plan import KnownPlan
from jobs.logging import log_event, set_run, status
from jobs.metrics import RunMetrics
from jobs.planned_job import warn_of_narrow_calibration
from jobs.publish.published_exports import PublishedExport
from jobs.publish.releases import Release, find_current, publish
from jobs.publish.verdict import (
    Verdict,
    failures,
    quality_figures,
    save_verdict,
)
from jobs.publish.verified_files import VerifiedFiles
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.run_exports import CATALOG_OPTION, check_exports, foresee_exports
from pipeline.errors import DamagedObjectError, PipelineError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import FunctionRunner
from pipeline.fidelity import Fidelity
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.planning.coverage import Coverage
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.remote_planning import identity
from pipeline.run.claim import claim
from pipeline.run.commits import damaged_files
from pipeline.run.lease import Lease
from pipeline.run.records import MANIFEST_KEY, is_weights_file
from pipeline.storage.object_store import ObjectStore


class GateFailedError(PipelineError):
    """A result that is not good enough; it is kept, and what was published before stays."""

    exit_code = 5


@dataclass(frozen=True, kw_only=True)
class Fulfilled:
    """What became of a request.

    Attributes:
        releases: under each of its names; none where the gate was not passed.
        solved: whether anything had to be quantized, or composed.
        note: what else there is to know, in words.
        driven_seconds: from its claim to its manifest; None unless it was quantized.
    """

    request: Request
    verdict: Verdict
    releases: tuple[Release, ...]
    solved: bool
    note: str = ""
    driven_seconds: float | None = None


def fulfil(
    root: ObjectStore, request: Request, open_compute: OpenCompute, options: DriverOptions
) -> Fulfilled:
    """Quantize or compose what is not there yet, evaluate, verify, judge, and publish.

    Doing so again, or at the same time, finds done what was done; workers are started only if
    something is to be computed.

    Args:
        root: the catalog's.

    Raises:
        LeaseHeldError: another driver is at work on the run, and it is not to be waited for.
    """
    set_run(run=request.run_id, model=request.model, recipe=request.recipe_name)
    with (
        options.acquire_lease(run_store(root, request.run_id)) as held,
        _request_compute(request, open_compute) as compute,
    ):
        artifact = find_intact(root, request)
        fidelity, note = None, ""
        if artifact is None and request.givers:
            make = partial(_make_giver, root, open_compute=open_compute, options=options)
            made = compose(root, request, compute.for_run, held, make)
            artifact, fidelity, note = made.run, made.fidelity, made.note
        elif artifact is None:
            artifact = _quantize(root, request, compute, held, options)
        if fidelity is None and (request.evaluated_on or request.tasks):
            fidelity = known_fidelity(root, request, artifact.manifest.record_sha256)
            if fidelity is None:
                fidelity = _evaluate(root, request, artifact, compute)
        verdict = _judge(request, artifact, fidelity)
        # Everything is read once more, just before readers are sent there.
        _verify(root, artifact)
        save_verdict(root, verdict)
        held.check()
        exports: tuple[PublishedExport, ...] = ()
        if verdict.passed:
            exports = release_exports(
                root,
                request,
                artifact.run_id,
                artifact.manifest,
                compute.for_run,
                options,
            )
        update_cards(run_store(root, artifact.run_id))
        update_report(run_store(root, artifact.run_id))
        held.check()
        releases = publish(root, request, verdict, exports) if verdict.passed else ()
        if compute.has_workers:
            if fidelity is not None:
                compute.metrics.judged(fidelity)
            compute.metrics.ended("finished" if verdict.passed else "gate_failed")
    return Fulfilled(
        request=request,
        verdict=verdict,
        releases=releases,
        solved=artifact.solved,
        note=note,
        driven_seconds=artifact.driven_seconds,
    )


def _make_giver(
    root: ObjectStore, request: Request, open_compute: OpenCompute, options: DriverOptions
) -> IntactRun:
    """Make a run that a composition takes blocks of: its own, or one that is swept or damaged."""
    log_event("giver", f"{request.run_id}: to be composed, and not there, or damaged; it is made")
    with (
        options.acquire_lease(run_store(root, request.run_id)) as held,
        _request_compute(request, open_compute) as compute,
    ):
        made = find_intact(root, request) or _quantize(root, request, compute, held, options)
        if compute.has_workers:
            compute.metrics.ended("finished")
        return made


@dataclass
class _RequestCompute:
    """What a request is computed with, opened when it is first needed, for one run at a time.

    Attributes:
        stack: keeps the workers until it is closed.
        metrics: of the request's run, which need workers: a request that is found done has none.
    """

    request: Request
    open_compute: OpenCompute
    stack: contextlib.ExitStack
    metrics: RunMetrics
    opened: tuple[str, Compute] | None = None

    @property
    def has_workers(self) -> bool:
        return self.opened is not None and self.opened[1].has_workers

    def for_run(self, store: ObjectStore) -> Compute:
        """What works on the run at a store's root."""
        if self.opened is None or self.opened[0] != store.root_url:
            # Workers on another run would keep what this one needs.
            self.stack.close()
            spec = self.request.needs
            if store.exists(PLAN_KEY):
                # As the run was started: it decides rounding.
                spec = read_plan(store).resuming(spec, finished=store.exists(MANIFEST_KEY))
            elif self.request.givers or not recipe_from_dict(self.request.recipe).chains_blocks:
                spec = spec.with_one_gpu_each()
            opened = self.open_compute(spec, self.request.source_url, store.root_url)
            self.opened = store.root_url, self.stack.enter_context(opened)
        return self.opened[1]


@contextlib.contextmanager
def _request_compute(request: Request, open_compute: OpenCompute) -> Iterator[_RequestCompute]:
    with contextlib.ExitStack() as stack:
        metrics = RunMetrics(model=request.model, recipe=request.recipe_name)
        compute = _RequestCompute(request, open_compute, stack, metrics)
        try:
            yield compute
        except PipelineError:
            if compute.has_workers:
                compute.metrics.ended("failed")
            raise


def _quantize(
    root: ObjectStore,
    request: Request,
    compute: _RequestCompute,
    held: Lease,
    options: DriverOptions,
) -> IntactRun:
    """Finish the request's run; or find the artifact of a run with the very same plan."""
    store = run_store(root, request.run_id)
    _, damaged = read_intact(store)
    run_compute = compute.for_run(store)
    threads = run_compute.allocation.threads
    with status("planning: hashing the source, checking every layer, cutting texts"):
        plan, windows, judged_on = run_compute.plan(
            lambda runner: _plan_all(request, store, runner, threads, run_compute.known)
        )
    is_new = not store.exists(PLAN_KEY)
    if is_new:
        current = find_current(root, request.model, request.recipe_name)
        same_plan = current is not None and current.release.plan_digest == plan.digest
        twin = intact(root, current.release.run_id, plan) if current and same_plan else None
        if twin is not None:
            log_event(
                "same content",
                f"{request.request_id}: files were written again, but their content is that of "
                f"{twin.run_id}; nothing to quantize",
            )
            return twin
    costs = run_compute.placed(run_compute.estimate(plan))
    run_compute.check_room(costs)
    run_compute.evaluation_pass(plan, judged_on)  # refused now, if it has no room
    if is_new:
        if windows is not None:
            coverage = Coverage.read(plan, lambda: windows)
            warn_of_narrow_calibration(() if coverage is None else coverage.warnings())
        plan = claim(store, _sharing_statistics(root, plan), windows)
    for finding in damaged:
        log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
    execution = execute(plan, store, run_compute, held, compute.metrics, options, damaged=damaged)
    execution.summarize(costs, None)
    return IntactRun(
        run_id=request.run_id,
        plan=plan,
        manifest=execution.manifest,
        solved=True,
        driven_seconds=execution.wall_seconds,
    )


def _sharing_statistics(root: ObjectStore, plan: Plan) -> Plan:
    """The plan, with its statistics where all runs of the catalog find them."""
    if not plan.uses_float_statistics:
        return plan
    return dataclasses.replace(plan, statistics_url=root.url(STATISTICS_FOLDER))


def _plan_all(
    request: Request, store: ObjectStore, runner: FunctionRunner, threads: int, known: KnownPlan
) -> tuple[Plan, bytes | None, EvaluationSet | None]:
    """See `_plan`; what the result will be judged by is read too, to find mistakes in it now."""
    plan, windows = _plan(request, store, runner, threads, known)
    check_exports(runner, request.source_url, plan, request.exports, option=CATALOG_OPTION)
    return plan, windows, _evaluation_set(request, plan, runner)


def _plan(
    request: Request, store: ObjectStore, runner: FunctionRunner, threads: int, known: KnownPlan
) -> tuple[Plan, bytes | None]:
    """The plan that the run was started with, or else a new one and its token windows.

    Only a new one reads the whole source, and not even that if a run before it did; parts are
    checked against any plan when they are read.
    """
    recipe = recipe_from_dict(request.recipe, where=request.request_id)
    # Before hours are spent on what cannot be exported.
    foreseen = foresee_exports(
        runner,
        request.source_url,
        recipe,
        request.exports,
        dry_run=False,
        option=CATALOG_OPTION,
    )
    foreseen.warn(recipe)
    if store.exists(PLAN_KEY):
        plan = read_plan(store)
        found = runner.run(identity, request.source_url, threads)
        check_identity(plan, found, request.source_url, finished=False)
        return plan, None
    return known.plan_next(runner, request.source_url, recipe, threads, planned_on(request))


def _evaluate(
    root: ObjectStore, request: Request, artifact: IntactRun, compute: _RequestCompute
) -> Fidelity:
    """Compare a finished result with its source, on the texts and tasks that a request names."""
    store = run_store(root, artifact.run_id)
    run_compute = compute.for_run(store)
    given = run_compute.plan(lambda runner: _evaluation_set(request, artifact.plan, runner))
    assert given is not None
    at_once = run_compute.evaluation_pass(artifact.plan, given)
    digest = artifact.manifest.record_sha256
    return judge(run_compute.executor, store, request.source_url, digest, given, at_once)


def _evaluation_set(request: Request, plan: Plan, runner: FunctionRunner) -> EvaluationSet | None:
    return read_evaluation_set(
        runner,
        request.source_url,
        plan,
        texts=request.evaluated_on,
        num_windows=request.evaluation_windows,
        tasks=request.tasks,
        named=f"evaluate_on, with {request.evaluation_windows} windows",
    )


def _judge(request: Request, artifact: IntactRun, fidelity: Fidelity | None) -> Verdict:
    files = artifact.manifest.files.items()
    return Verdict(
        request_id=request.request_id,
        model=request.model,
        recipe_name=request.recipe_name,
        run_id=artifact.run_id,
        plan_digest=artifact.plan.digest,
        manifest_sha256=artifact.manifest.record_sha256,
        source_bytes=sum(part.source_bytes for part in artifact.plan.parts),
        stored_bytes=sum(entry.size_bytes for key, entry in files if is_weights_file(key)),
        quality=quality_figures(fidelity),
        gate=None if request.gate is None else request.gate.model_dump(),
        failures=failures(request.gate, fidelity),
    )


def _verify(root: ObjectStore, artifact: IntactRun) -> None:
    """Read and hash everything once more, and note which versions of the files that was.

    Raises:
        DamagedObjectError: something was damaged since it was found whole.
    """
    store = run_store(root, artifact.run_id)
    versions = store.versions()
    damaged = damaged_files(store, artifact.manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} objects are damaged, the first: {damaged[0].problem}; nothing was "
            "published: start again, which makes them again"
        )
    VerifiedFiles.of(artifact.run_id, artifact.manifest, versions).save(root)


def fulfilled_json(done: Fulfilled) -> dict[str, object]:
    """Plain JSON values, for machines."""
    return {
        "request_id": done.request.request_id,
        "solved": done.solved,
        "verdict": dataclasses.asdict(done.verdict),
        "releases": [release.content() for release in done.releases],
    }
