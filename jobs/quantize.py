"""`quantfleet quantize`, `resume` and `evaluate`: one model × one recipe, from plan to report."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.evaluating import judge, read_evaluation_set
from jobs.execute import (
    Compute,
    DriverOptions,
    check_identity,
    execute,
    open_compute,
)
from jobs.finished_result import print_finished
from jobs.logging import log_event, set_run, status, url_name, waiting
from jobs.metrics import RunMetrics
from jobs.planned_job import PlannedJob, log_finished_before, report_plan
from jobs.reachable import absolute, check_writable, reachable
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.run_costs import PricedMachine, Workers
from jobs.run_exports import (
    check_exports,
    foresee_exports,
    make_exports,
    pending_exports,
    want_exports,
)
from jobs.shared_statistics import captured_before, check_same_folder, check_statistics_folder
from jobs.summary import Summary
from jobs.termination import Terminated
from pipeline.composition.auto_run import AutoRun
from pipeline.errors import PipelineError, UnusableResultError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.named_texts import EvaluatedTexts
from pipeline.evaluation.tasks import read_tasks
from pipeline.executor.protocol import Allocation, ComputeSpec, FunctionRunner
from pipeline.export.description import MadeExport
from pipeline.export.settings import ExportSettings
from pipeline.model.preset import CONFIG_FILE, check_preset
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.planning.estimates import Estimate, estimate
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import identity, plan_by_metadata, plan_on
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.overlap import check_apart


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to quantize, where to put it, and what to judge it by.

    Attributes:
        evaluation_sets: named texts; each has figures of its own.
        evaluation_windows: of each set.
        chat: how conversations among the evaluation texts are read; None as in the calibration.
        exports: what to export the finished result as, besides what the run was started with.
        statistics_url: the folder of statistics that runs share; "" for the run's own.
    """

    source_url: str
    output_url: str
    evaluation_texts: tuple[str, ...] = ()
    evaluation_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluation_windows: int = 8
    tasks: tuple[str, ...] = ()
    chat: bool | None = None
    exports: tuple[ExportSettings, ...] = ()
    statistics_url: str = ""
    options: DriverOptions = field(default_factory=DriverOptions)

    @property
    def is_evaluated(self) -> bool:
        """Whether there is anything to judge the result by."""
        return bool(self.evaluated_on or self.tasks)

    @property
    def evaluated_on(self) -> EvaluatedTexts:
        """The texts to judge the result by."""
        return EvaluatedTexts(texts=self.evaluation_texts, sets=self.evaluation_sets)

    @property
    def resume_command(self) -> str:
        """What ends as this job would have; the run itself knows its exports."""
        words = ["quantfleet", "resume", self.output_url]
        for text in self.evaluated_on.arguments:
            words += ["--evaluate-on", text]
        if self.evaluated_on:
            words += ["--windows", str(self.evaluation_windows)]
            words += {None: [], True: ["--chat"], False: ["--no-chat"]}[self.chat]
        for task in self.tasks:
            words += ["--tasks", task]
        return shlex.join(words)


def run_job(
    job: Job,
    recipe: Recipe,
    spec: ComputeSpec,
    address: str | None,
    *,
    as_json: bool,
    dry_run: PricedMachine | None = None,
) -> None:
    """Plan, claim, quantize, evaluate and report.

    Args:
        dry_run: where the plan is to be costed instead of carried out.
    """
    job, store, finished = open_job(job, recipe.name, recipe, dry_run=dry_run is not None)

    def plan_all(runner: FunctionRunner) -> PlannedJob:
        # Before all else, since it reads no weights.
        exports = foresee_exports(
            runner, job.source_url, recipe, job.exports, dry_run=dry_run is not None
        )
        given = job.source_url, recipe, compute.allocation.threads
        priced: Workers | str = ""
        captured = False
        if dry_run is not None:
            plan, windows, _ = runner.run(plan_by_metadata, *given)
            priced = dry_run.find(runner, compute.allocation)
            if dry_run.named is None:  # sums of other machines are other sums
                there = dataclasses.replace(plan, statistics_url=job.statistics_url)
                captured = captured_before(there, job.output_url)
        else:
            plan, windows = plan_on(runner, *given)
        check_exports(runner, job.source_url, plan, job.exports)
        # Before anything is claimed: a mistyped file must not cost a run.
        judged_on = None if dry_run is not None else read_job_evaluation(job, plan, runner)
        return PlannedJob(
            plan=plan,
            windows=windows,
            judged_on=judged_on,
            exports=exports,
            priced=priced,
            num_evaluated=job.evaluation_windows * len(job.evaluated_on.by_name),
            has_tasks=bool(job.tasks),
            keep_every=job.options.keep_every,
            captured=captured,
        )

    if not recipe.chains_blocks:
        spec = spec.with_one_gpu_each()
    if dry_run is not None and dry_run.named is not None:
        spec = spec.without_kind()  # which is asked of others than those at hand
    with open_compute(
        spec, job.source_url, job.output_url, address=address, plan_only=dry_run is not None
    ) as compute:
        if dry_run is None or dry_run.named is None:  # else what is at hand decides nothing
            log_allocation(compute.allocation, spec, address, plan_only=dry_run is not None)
        with status("planning: hashing the source, checking every layer, cutting texts"):
            has_work = not finished or job.is_evaluated or bool(job.exports)
            planned = compute.plan(plan_all, with_workers=has_work and dry_run is None)
        plan, judged_on = planned.plan, planned.judged_on
        if dry_run is not None:
            output_url = job.output_url if finished else ""
            report_plan(planned, compute, dry_run, finished_at=output_url, as_json=as_json)
            return
        costs = compute.estimate(plan)
        if not finished:
            costs = compute.placed(costs)
            compute.check_room(costs)
        compute.evaluation_pass(plan, judged_on)  # refused now, if it has no room
        planned.exports.warn(recipe)
        planned.warn()
        wanted = {settings.key: settings.to_json() for settings in job.exports}
        plan = claim(
            store,
            dataclasses.replace(plan, statistics_url=job.statistics_url),
            planned.windows,
            beside=wanted,
        )
        if job.statistics_url:
            check_same_folder(job.statistics_url, plan, store)
        want_exports(store, job.exports)
        _finish(plan, job, store, compute, costs, judged_on, as_json=as_json)


def open_job(
    job: Job, recipe_name: str, recipe: Recipe, *, dry_run: bool
) -> tuple[Job, ObjectStore, bool]:
    """Refuse a job whose preset cannot be read, or whose output cannot be written.

    Args:
        recipe: that shared statistics are to be used by.

    Returns:
        The job, with absolute URLs; the store at its output; whether there is a result.
    """
    job = dataclasses.replace(
        job,
        source_url=absolute(job.source_url),
        output_url=absolute(job.output_url),
        statistics_url=absolute(job.statistics_url),
    )
    set_run(run=url_name(job.output_url), model=url_name(job.source_url), recipe=recipe_name)
    check_apart(job.source_url, job.output_url)
    if job.statistics_url:
        check_statistics_folder(job.statistics_url, job.source_url, job.output_url, recipe)
    if not dry_run:
        read_tasks(job.tasks)  # mistakes in them need no model to be found
    with waiting("looking at preset and output"):
        # Before anything else: an output that cannot be read cannot be written either.
        store = reachable(job.output_url)
        check_preset(reachable(job.source_url, CONFIG_FILE))
        finished = store.exists(MANIFEST_KEY)
        if not finished or job.is_evaluated or job.exports:
            check_writable(store)
        if job.statistics_url:
            check_writable(reachable(job.statistics_url), "--statistics")
    return job, store, finished


def resume_job(
    job: Job,
    spec: ComputeSpec,
    address: str | None,
    *,
    as_json: bool,
    must_be_finished: bool = False,
) -> None:
    """Go on with the run at a job's output, as its plan says.

    Args:
        job: of a source "", which means that the source is where it was.

    Raises:
        PipelineError: there is no run, or its source is not what it was.
    """
    read_tasks(job.tasks)
    output_url = absolute(job.output_url)
    set_run(run=url_name(output_url))
    store = reachable(output_url)
    finished = store.exists(MANIFEST_KEY)
    # Its choices are made before it is planned.
    if not store.exists(PLAN_KEY) and not (must_be_finished and store.exists(AutoRun.key)):
        raise PipelineError(
            f"{store.url(PLAN_KEY)} is missing: no run was started there; start one with "
            "quantfleet quantize"
        )
    if must_be_finished and not finished:
        raise PipelineError(
            f"{store.url(MANIFEST_KEY)} is missing: the run is not finished; finish it with "
            f"quantfleet resume {shlex.quote(output_url)}"
        )
    if not finished or job.is_evaluated:
        check_writable(store)  # before anything is computed
    plan = read_plan(store)
    if plan.composed and not finished:
        raise PipelineError(
            f"{store.url(PLAN_KEY)} is the plan of a composition that is not finished; go on with "
            "the quantfleet compose that began it"
        )
    if plan.makes == "statistics":
        raise PipelineError(
            f"{output_url} holds statistics that several runs may use; resume one of these, which "
            "captures what is missing"
        )
    source_url = absolute(job.source_url) or plan.source_url
    set_run(run=url_name(output_url), model=url_name(source_url), recipe=plan.recipe.name)
    if finished and not job.is_evaluated:
        log_finished_before(output_url)
        found, costs = read_manifest(store), estimate(plan, 1)
        made: tuple[MadeExport, ...] = ()
        if pending_exports(store):
            with open_compute(spec, source_url, output_url, address=address) as compute:
                made = make_exports(compute, store)
        update_cards(store)
        update_report(store)
        summary = Summary.of(plan, store, found, costs, {}, wall_seconds=0.0, fidelity=None)
        print_finished(summary, store, made, as_json=as_json)
        return
    job = dataclasses.replace(job, source_url=source_url, output_url=output_url)
    check_preset(reachable(source_url, CONFIG_FILE))

    def check_source(runner: FunctionRunner) -> EvaluationSet | None:
        found = runner.run(identity, source_url, compute.allocation.threads)
        check_identity(plan, found, source_url, finished=finished)
        return read_job_evaluation(job, plan, runner)

    spec = plan.resuming(spec, finished=finished)
    with open_compute(spec, source_url, output_url, address=address) as compute:
        log_allocation(compute.allocation, spec, address)
        with status("checking that source and machine are what they were"):
            judged_on = compute.plan(check_source)
        costs = compute.placed(compute.estimate(plan))
        compute.check_room(costs)
        compute.evaluation_pass(plan, judged_on)
        _finish(plan, job, store, compute, costs, judged_on, as_json=as_json)


def log_allocation(
    allocation: Allocation, spec: ComputeSpec, address: str | None, *, plan_only: bool = False
) -> None:
    """Say what a run computes with."""
    where = address or ("" if plan_only else "a Ray cluster started on ") + "this machine"
    on = "CPU"
    if allocation.gpus:
        on = "one GPU each" if allocation.gpus == 1 else f"{allocation.gpus} GPUs each"
    why = "" if allocation.gpus or spec.device == "cpu" else " (no GPU found)"
    log_event(
        "joined",
        f"{allocation.workers} worker(s) × {allocation.threads} thread(s) on {on}{why}, {where}",
        allocation.to_dict(),
    )


def _finish(
    plan: Plan,
    job: Job,
    store: ObjectStore,
    compute: Compute,
    costs: Estimate,
    judged_on: EvaluationSet | None,
    *,
    as_json: bool,
) -> None:
    """Drive a claimed run to its end, evaluate its result and report."""
    metrics = RunMetrics(model=url_name(job.source_url), recipe=plan.recipe.name)
    fidelity = None
    try:
        with contextlib.ExitStack() as stack:
            held = None
            if not store.exists(MANIFEST_KEY):
                held = stack.enter_context(job.options.acquire_lease(store))
                # The driver that was waited for may have finished.
                held = None if store.exists(MANIFEST_KEY) else held
            if held is None:
                log_finished_before(job.output_url)
            execution = execute(plan, store, compute, held, metrics, job.options)
        if judged_on is not None:
            at_once = compute.evaluation_pass(plan, judged_on)
            digest = execution.manifest.record_sha256
            fidelity = judge(compute.executor, store, job.source_url, digest, judged_on, at_once)
            metrics.judged(fidelity)
        made = make_exports(compute, store, job.exports)
        if held is not None:  # or there was nothing to do
            metrics.ended("finished")
    except (Exception, KeyboardInterrupt, Terminated) as end:
        if compute.has_workers:
            metrics.ended("failed" if isinstance(end, Exception) else "interrupted")
        log_event("resumable", f"to go on from the last committed block: {job.resume_command}")
        raise
    after = compute.executor.take_work() if compute.has_workers else ()
    summary = execution.summarize(costs, fidelity, after)
    update_cards(store)
    update_report(store)
    print_finished(summary, store, made, as_json=as_json)
    if fidelity is not None and fidelity.not_finite is not None:
        raise UnusableResultError(
            f"{job.output_url}: the result gives {fidelity.not_finite}; keep what stays in float "
            "in bfloat16 or float32 (--dtype), or choose another scheme"
        )


def read_job_evaluation(job: Job, plan: Plan, runner: FunctionRunner) -> EvaluationSet | None:
    """What a job's result is to be judged by (see `read_evaluation_set`)."""
    return read_evaluation_set(
        runner,
        job.source_url,
        plan,
        texts=job.evaluated_on,
        num_windows=job.evaluation_windows,
        tasks=job.tasks,
        chat=job.chat,
        named=f"--evaluate-on, with --windows {job.evaluation_windows}",
    )
