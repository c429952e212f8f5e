"""The choices of a recipe that chooses widths: planned, claimed, made, and composed to a result."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict

from jobs.composing import Composing
from jobs.composition_texts import AskedTexts, read_composition_texts
from jobs.execute import Compute, DriverOptions, execute
from jobs.logging import log_event, url_name
from jobs.metrics import RunMetrics
from jobs.planned_job import log_finished_before
from jobs.quantities import size
from jobs.run_exports import want_exports
from pipeline.composition.auto_run import CHOICES_PREFIX, AutoRun, choice_stores
from pipeline.composition.composed_plan import (
    GivenRun,
    check_composable,
    check_names,
    read_given_run,
)
from pipeline.composition.decision import Decision, blocks_bytes
from pipeline.composition.target import Target, block_weights
from pipeline.errors import PipelineError, PlanMismatchError
from pipeline.executor.protocol import FunctionRunner
from pipeline.export.settings import ExportSettings
from pipeline.plan import PLAN_KEY, Plan
from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.remote_planning import plan_by_metadata, plan_on, plan_others
from pipeline.run.claim import check_empty, claim
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore


def plan_choices(
    runner: FunctionRunner, source_url: str, recipe: AutoRecipe, threads: int, *, read_weights: bool
) -> tuple[tuple[Plan, ...], bytes | None]:
    """The plans of all choices, in their order, and the token windows that they name.

    The source is hashed, and texts are cut, once.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    first, *others = recipe.recipes
    if read_weights:
        plan, windows = plan_on(runner, source_url, first, threads)
    else:
        plan, windows, _ = runner.run(plan_by_metadata, source_url, first, threads)
    plans = (plan, *runner.run(plan_others, source_url, others, threads, plan, windows))
    check_names(plans)
    return plans, windows


def claim_choices(
    store: ObjectStore,
    recipe: AutoRecipe,
    plans: Sequence[Plan],
    windows: bytes | None,
    *,
    statistics_url: str,
    exports: Sequence[ExportSettings] = (),
) -> tuple[Plan, ...]:
    """Write the choices' plans below a store's root, and last that they belong together.

    Returns:
        the plans, as they were written first.

    Raises:
        PlanMismatchError: something else is there.
    """
    wanted = AutoRun(
        recipe=recipe, source_url=plans[0].source_url, plans=tuple(plan.digest for plan in plans)
    )
    found = AutoRun.find(store)
    if found is not None and (found.recipe, found.plans) != (wanted.recipe, wanted.plans):
        what = "choices" if found.plans != wanted.plans else "target"
        raise PlanMismatchError(
            f"{store.url(AutoRun.key)} is of another recipe or source (other {what}); choose "
            "another --output; for another target of the same choices compose their runs, below "
            f"{store.root_url}/{CHOICES_PREFIX}"
        )
    if found is None:
        if store.exists(PLAN_KEY):
            raise PlanMismatchError(
                f"{store.url(PLAN_KEY)} is the plan of another run; choose another --output"
            )
        check_empty(store, [CHOICES_PREFIX])
    want_exports(store, exports)
    if found is not None and store.exists(MANIFEST_KEY):
        return tuple(plans)  # the choices may have been deleted
    claimed = tuple(
        claim(run, dataclasses.replace(plan, statistics_url=statistics_url), windows)
        for run, plan in zip(choice_stores(store.root_url, recipe), plans, strict=True)
    )
    if found is None:
        store.create(AutoRun.key, wanted.to_json())
    return claimed


def make_auto(
    recipe: AutoRecipe,
    plans: Sequence[Plan],
    store: ObjectStore,
    source_url: str,
    compute: Compute,
    options: DriverOptions,
    check_lease: Callable[[], None],
) -> tuple[Plan, Decision]:
    """Make all choices that are not made, choose, and compose the result.

    Args:
        plans: as `claim_choices` gives them.
        store: opened at the result's root, of which the caller holds the lease.

    Returns:
        the result's plan, and how it came about.

    Raises:
        PipelineError: the smallest choice, now that it is made, is larger than the target.
    """
    target = Target(bits=recipe.scheme.target_bits, num_bytes=recipe.scheme.target_bytes)
    runs: list[GivenRun] = []
    for plan, run in zip(plans, choice_stores(store.root_url, recipe), strict=True):
        log_event("choice", f"{plan.recipe.name}: {len(runs) + 1} of {len(plans)} choices")
        _make_choice(plan, run, compute, options)
        check_lease()
        runs.append(read_given_run(run))
        if len(runs) == 1:
            _check_smallest(recipe, target, runs[0])
    check_composable(runs)
    texts = read_composition_texts(
        AskedTexts(measure_windows=recipe.scheme.measure_windows),
        runs,
        source_url,
        compute.executor,
    )
    composing = Composing(
        target=target,
        recipe_name=recipe.name,
        runs=runs,
        store=store,
        compute=compute,
        texts=texts,
        source_url=source_url,
        beside=(CHOICES_PREFIX,),
        by_layers=recipe.scheme.by_layers,
    )
    outlook = dataclasses.replace(composing.outlook(), target=recipe.scheme.target_text)
    log_event("chosen", "", {"choice": asdict(outlook.choice)}, table=outlook.tables())
    decision, _ = composing.decided(outlook, check_lease)
    return composing.make(decision, check_lease), decision


def _make_choice(plan: Plan, run: ObjectStore, compute: Compute, options: DriverOptions) -> None:
    """Drive the run of one choice to its end, or find that it is there."""
    # Also where it is finished: what measures blocks has to be of a run that is there.
    compute.executor.work_on(run.root_url)
    damaged = damaged_files(run, read_manifest(run)) if run.exists(MANIFEST_KEY) else ()
    for finding in damaged:
        log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
    if run.exists(MANIFEST_KEY) and not damaged:
        log_finished_before(run.root_url)
        return
    metrics = RunMetrics(model=url_name(plan.source_url), recipe=plan.recipe.name)
    costs = compute.placed(compute.estimate(plan))
    with options.acquire_lease(run) as held:
        execution = execute(plan, run, compute, held, metrics, options, damaged=damaged)
    execution.summarize(costs, None)


def _check_smallest(recipe: AutoRecipe, target: Target, smallest: GivenRun) -> None:
    least = blocks_bytes(smallest)
    if least > target.block_bytes(smallest):
        bits = 8 * least / block_weights(smallest)
        raise PipelineError(
            f"recipe {recipe.name}: {recipe.scheme.target_text}: the blocks at "
            f"{recipe.scheme.choices[0]} bits, the smallest choice, take {bits:.3f} bits a weight "
            f"as stored, {size(smallest.size_bytes)} ({smallest.size_bytes} bytes) with what is "
            "outside the blocks; raise the target, or give choices fewer bits or group_size more "
            "inputs, in another --output"
        )


def choices_text(store: ObjectStore) -> str:
    """What became of the choices' runs, in words."""
    return (
        f"the choices' runs stay in {store.root_url}/{CHOICES_PREFIX}, for other targets by "
        f"quantfleet compose; quantfleet gc {shlex.quote(store.root_url)} --choices --delete "
        "deletes them"
    )
