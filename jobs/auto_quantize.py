"""`quantfleet quantize` by a recipe that chooses widths: a run for each, and one result of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.auto_choices import (
    choices_text,
    claim_choices,
    make_auto,
    plan_choices,
)
from jobs.auto_outlook import AutoOutlook
from jobs.evaluating import judge
from jobs.execute import Compute, check_identity, open_compute
from jobs.finished_result import print_finished
from jobs.logging import is_json, log_event, print_json, set_run, status, url_name
from jobs.metrics import RunMetrics
from jobs.planned_job import log_finished_before, warn_of_narrow_calibration
from jobs.quantize import (
    Job,
    log_allocation,
    open_job,
    read_job_evaluation,
    resume_job,
)
from jobs.reachable import absolute, check_writable, reachable
from jobs.release.cards import update_cards
from jobs.report.run_report import update_report
from jobs.run_costs import PricedMachine, Workers
from jobs.run_exports import (
    ForeseenExports,
    check_exports,
    foresee_exports,
    make_exports,
    refuse_exports,
)
from jobs.shared_statistics import check_same_folder
from jobs.summary import Summary
from jobs.termination import Terminated
from pipeline.composition.auto_run import CHOICES_PREFIX, AutoRun, choice_stores
from pipeline.composition.decision import Decision
from pipeline.errors import (
    MissingObjectError,
    PipelineError,
    UnusableResultError,
)
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.tasks import read_tasks
from pipeline.executor.protocol import ComputeSpec, FunctionRunner
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.model.preset import CONFIG_FILE, check_preset
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.planning.coverage import Coverage
from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.remote_planning import identity
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class PlannedChoices:
    """The plans of all choices, in their order, and what is known before they are made.

    Attributes:
        windows: to calibrate on, serialized.
        judged_on: what to evaluate the result on.
        exports: of each choice.
        outlook: sizes and seconds.
    """

    plans: tuple[Plan, ...]
    windows: bytes | None
    judged_on: EvaluationSet | None
    exports: tuple[ForeseenExports, ...]
    outlook: AutoOutlook


def run_auto(
    job: Job,
    recipe: AutoRecipe,
    spec: ComputeSpec,
    address: str | None,
    *,
    as_json: bool,
    dry_run: PricedMachine | None = None,
) -> None:
    """Plan, claim, quantize at every width, choose, compose, evaluate and report.

    Args:
        dry_run: where the plans are to be costed instead of carried out.
    """
    refuse_exports(job.exports)
    # Statistics are the same for all choices.
    job, store, finished = open_job(
        job, recipe.name, recipe.recipes[0], dry_run=dry_run is not None
    )

    def plan_all(runner: FunctionRunner) -> PlannedChoices:
        exports = tuple(
            foresee_exports(runner, job.source_url, one, job.exports, dry_run=False)
            for one in recipe.recipes
        )
        threads = compute.allocation.threads
        priced: Workers | str = ""
        if dry_run is not None:
            priced = dry_run.find(runner, compute.allocation)
        plans, windows = plan_choices(
            runner, job.source_url, recipe, threads, read_weights=dry_run is None
        )
        for plan in plans:
            check_exports(runner, job.source_url, plan, job.exports)
        num_evaluated = job.evaluation_windows * len(job.evaluated_on.by_name)
        outlook = AutoOutlook.of(recipe, plans, priced, num_evaluated=num_evaluated)
        outlook.check_target(recipe)
        judged_on = None if dry_run is not None else read_job_evaluation(job, plans[0], runner)
        return PlannedChoices(
            plans=plans, windows=windows, judged_on=judged_on, exports=exports, outlook=outlook
        )

    spec = spec.with_one_gpu_each()
    if dry_run is not None and dry_run.named is not None:
        spec = spec.without_kind()
    with open_compute(
        spec,
        job.source_url,
        f"{job.output_url}/{CHOICES_PREFIX}w{recipe.scheme.choices[0]}",
        address=address,
        plan_only=dry_run is not None or finished,
    ) as compute:
        if dry_run is None or dry_run.named is None:
            log_allocation(compute.allocation, spec, address, plan_only=dry_run is not None)
        with status("planning: hashing the source, checking every layer, cutting texts"):
            has_work = not finished and dry_run is None
            planned = compute.plan(plan_all, with_workers=has_work)
        if dry_run is not None:
            _report_plans(planned, compute, dry_run, store, as_json=as_json)
            return
        if not finished:
            _check_room(compute, planned.plans)
        compute.evaluation_pass(planned.plans[0], planned.judged_on)
        _warn(planned, recipe)
        plans = claim_choices(
            store,
            recipe,
            planned.plans,
            planned.windows,
            statistics_url=job.statistics_url or f"{store.root_url}/{STATISTICS_FOLDER}",
            exports=job.exports,
        )
        if job.statistics_url and not finished:
            run = choice_stores(store.root_url, recipe)[0]
            check_same_folder(job.statistics_url, plans[0], run)
        if not finished:
            _finish(job, recipe, plans, store, compute, planned.judged_on, as_json=as_json)
    if finished:
        resume_job(job, spec, address, as_json=as_json)


def resume_auto(job: Job, spec: ComputeSpec, address: str | None, *, as_json: bool) -> bool:
    """Go on with the choices at a job's output, and with the result of them.

    Args:
        job: of a source "", which means that the source is where it was.

    Returns:
        False if there is no such result, or it is finished: then it is a run like any other.
    """
    output_url = absolute(job.output_url)
    store = reachable(output_url, PLAN_KEY)
    found = AutoRun.find(store)
    if found is None or store.exists(MANIFEST_KEY):
        return False
    read_tasks(job.tasks)
    check_writable(store)
    recipe = found.recipe
    source_url = absolute(job.source_url) or found.source_url
    set_run(run=url_name(output_url), model=url_name(source_url), recipe=recipe.name)
    plans = []
    for run in choice_stores(store.root_url, recipe):
        try:
            plans.append(read_plan(run))
        except MissingObjectError as error:
            raise PipelineError(
                f"{error}; repeat the quantfleet quantize that began it, which plans it again"
            ) from error
    job = dataclasses.replace(job, source_url=source_url, output_url=output_url)
    check_preset(reachable(source_url, CONFIG_FILE))

    def check_source(runner: FunctionRunner) -> EvaluationSet | None:
        now = runner.run(identity, source_url, compute.allocation.threads)
        check_identity(plans[0], now, source_url, finished=False)
        return read_job_evaluation(job, plans[0], runner)

    spec = plans[0].resuming(spec, finished=False)
    first = f"{output_url}/{CHOICES_PREFIX}w{recipe.scheme.choices[0]}"
    with open_compute(spec, source_url, first, address=address) as compute:
        log_allocation(compute.allocation, spec, address)
        with status("checking that source and machine are what they were"):
            judged_on = compute.plan(check_source)
        _check_room(compute, plans)
        compute.evaluation_pass(plans[0], judged_on)
        _finish(job, recipe, plans, store, compute, judged_on, as_json=as_json)
    return True


def _check_room(compute: Compute, plans: Sequence[Plan]) -> None:
    for plan in plans:
        compute.check_room(compute.placed(compute.estimate(plan)))


def _warn(planned: PlannedChoices, recipe: AutoRecipe) -> None:
    """Say what no runtime would serve, and where calibration shows too little."""
    for foreseen, one in zip(planned.exports, recipe.recipes, strict=True):
        foreseen.warn(one)
    windows = planned.windows
    if windows is not None:
        coverage = Coverage.read(planned.plans[0], lambda: windows)
        warn_of_narrow_calibration(() if coverage is None else coverage.warnings())


def _report_plans(
    planned: PlannedChoices,
    compute: Compute,
    dry_run: PricedMachine,
    store: ObjectStore,
    *,
    as_json: bool,
) -> None:
    """Print what would be made, and refuse what would not fit."""
    outlook, named = planned.outlook, dry_run.named
    if as_json:
        print_json(outlook.to_dict() | {"plans": [plan.content() for plan in planned.plans]})
    else:
        log_event("planned", "", {"auto": outlook.to_dict()}, table=outlook.table())
    if store.exists(MANIFEST_KEY):
        log_finished_before(store.root_url)
    for plan in planned.plans:
        if named is not None:
            named.check_room(named.estimate(plan))
        elif not store.exists(MANIFEST_KEY):
            compute.check_room(compute.placed(compute.estimate(plan)))


def _finish(
    job: Job,
    recipe: AutoRecipe,
    plans: Sequence[Plan],
    store: ObjectStore,
    compute: Compute,
    judged_on: EvaluationSet | None,
    *,
    as_json: bool,
) -> None:
    """Make the result, evaluate it and report."""
    start = time.monotonic()
    metrics = RunMetrics(model=url_name(job.source_url), recipe=recipe.name)
    fidelity = None
    try:
        with job.options.acquire_lease(store) as held:
            if store.exists(MANIFEST_KEY):  # by the driver that was waited for
                log_finished_before(store.root_url)
                plan, decision = read_plan(store), Decision.read(store, Decision.key)
            else:
                plan, decision = make_auto(
                    recipe, plans, store, job.source_url, compute, job.options, held.check
                )
        wall_seconds = time.monotonic() - start
        compute.executor.work_on(store.root_url)
        manifest = read_manifest(store)
        if judged_on is not None:
            at_once = compute.evaluation_pass(plan, judged_on)
            digest = manifest.record_sha256
            fidelity = judge(compute.executor, store, job.source_url, digest, judged_on, at_once)
            metrics.judged(fidelity)
        made = make_exports(compute, store, job.exports)
        metrics.ended("finished")
    except (Exception, KeyboardInterrupt, Terminated) as end:
        if compute.has_workers:
            metrics.ended("failed" if isinstance(end, Exception) else "interrupted")
        log_event("resumable", f"to go on from the last committed block: {job.resume_command}")
        raise
    costs = compute.estimate(plan)
    summary = Summary.of(
        plan, store, manifest, costs, {}, wall_seconds=wall_seconds, fidelity=fidelity
    )
    update_cards(store)
    update_report(store)
    print_finished(
        summary,
        store,
        made,
        values=summary.to_dict() | {"decision": decision.content()},
        as_json=as_json,
    )
    if not as_json or is_json():
        said = decision.outcome.replace(str(decision.target), recipe.scheme.target_text)
        log_event("composed", said)
        log_event("kept", choices_text(store))
    if fidelity is not None and fidelity.not_finite is not None:
        raise UnusableResultError(
            f"{job.output_url}: the result gives {fidelity.not_finite}; raise the target, or keep "
            "what stays in float in bfloat16 or float32 (--dtype)"
        )
