"""A composition that a catalog asks for, made of the blocks of its model's runs.

What a block of a run costs the model is kept in that run's own folder, and goes with it: all
compositions of it use it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

from jobs.catalog.request import Request, run_store
from jobs.composing import Composing
from jobs.composition_texts import AskedTexts, CompositionTexts, read_composition_texts
from jobs.evaluating import Rows
from jobs.execute import Compute, check_identity
from jobs.fleet.composition_forecast import foresee_composition
from jobs.fleet.intact_runs import IntactRun, find_intact, intact, read_intact
from jobs.logging import log_event, status
from jobs.publish.releases import find_current
from pipeline.composition.composed_plan import (
    GivenRun,
    Pick,
    check_composable,
    read_given_run,
)
from pipeline.composition.decision import Decision, check_target
from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError
from pipeline.executor.protocol import FunctionRunner
from pipeline.fidelity import Fidelity
from pipeline.plan import PLAN_KEY, Plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.remote_planning import identity, plan_for_costs
from pipeline.run.commits import Finding, read_manifest
from pipeline.run.lease import Lease
from pipeline.storage.object_store import ObjectStore

_NOTHING: Mapping[Pick, Rows] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ComposedResult:
    """A composition that is finished.

    Attributes:
        fidelity: on what its request names; None if that is nothing, or was not measured now.
        note: that a run was kept instead, in words; "" where none was.
    """

    run: IntactRun
    fidelity: Fidelity | None = None
    note: str = ""


def compose(
    root: ObjectStore,
    request: Request,
    compute_for: Callable[[ObjectStore], Compute],
    held: Lease,
    make_run: Callable[[Request], IntactRun],
) -> ComposedResult:
    """Measure, choose, compare, and make the better result; or go on with that.

    Args:
        request: of a composition.
        compute_for: what works on the run at a store's root.
        held: the lease on the composition's own run.
        make_run: makes a run that is to give blocks, and is not there.

    Raises:
        PipelineError: runs that do not fit together, or a target that cannot be met.
    """
    asked_of = request.composed_of
    assert asked_of is not None
    known = [find_intact(root, giver) for giver in request.givers]
    if None in known:
        _check_plans(request, compute_for(run_store(root, request.run_id)))
    givers = [one or make_run(giver) for one, giver in zip(known, request.givers, strict=True)]
    runs = [read_given_run(run_store(root, giver.run_id)) for giver in givers]
    store = run_store(root, request.run_id)
    with _as_catalogs_say():
        check_composable(runs)
        check_target(asked_of.target, runs)
    asked = _asked_texts(request)
    compute = compute_for(runs[0].store)
    with _as_catalogs_say(), status("checking the source, cutting texts"):
        texts = compute.plan(lambda runner: _texts(request, asked, runs, compute, runner))
    composing = Composing(
        target=asked_of.target,
        recipe_name=request.recipe_name,
        runs=runs,
        store=store,
        compute=compute,
        texts=texts,
        source_url=request.source_url,
        kept_in_runs=True,
        by_layers=asked_of.by_layers,
    )
    if (twin := _same_before(root, request, composing)) is not None:
        log_event(
            "same content",
            f"{request.request_id}: files were written again, but what it is composed of is what "
            f"{twin.run_id} was; nothing to compose",
        )
        return ComposedResult(run=twin)
    _, damaged = read_intact(store)
    return _made(request, composing, asked, held, damaged)


def _check_plans(request: Request, compute: Compute) -> None:
    """Refuse, before runs are made for it, a composition that metadata tells is impossible."""

    def plan(runner: FunctionRunner) -> list[Plan]:
        return [
            runner.run(
                plan_for_costs,
                giver.source_url,
                recipe_from_dict(giver.recipe),
                compute.allocation.threads,
            )
            for giver in request.givers
        ]

    with status("planning the runs to compose"):
        plans = compute.plan(plan, with_workers=False)
    foresee_composition(request, plans, "")


def _made(
    request: Request,
    composing: Composing,
    asked: AskedTexts,
    held: Lease,
    damaged: Sequence[Finding],
) -> ComposedResult:
    for finding in damaged:
        log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
    with _as_catalogs_say():
        decision, found = composing.decided_before(), _NOTHING
        if decision is None:
            outlook = composing.outlook()
            log_event("chosen", "", {"choice": asdict(outlook.choice)}, table=outlook.tables())
            decision, found = composing.decided(outlook, held.check)
    plan = composing.make(decision, held.check, damaged=damaged)
    is_uniform = decision.kept is not None
    log_event("composed", decision.outcome, level=logging.WARNING if is_uniform else logging.INFO)
    return ComposedResult(
        run=IntactRun(
            run_id=request.run_id,
            plan=plan,
            manifest=read_manifest(composing.store),
            solved=True,
        ),
        fidelity=composing.judged(asked, decision, found) if asked.judges else None,
        note=decision.outcome if is_uniform else "",
    )


def _asked_texts(request: Request) -> AskedTexts:
    asked_of = request.composed_of
    assert asked_of is not None
    return AskedTexts(
        measure_texts=asked_of.measure_texts,
        measure_windows=asked_of.measure_windows,
        evaluated_on=request.evaluated_on,
        evaluation_windows=request.evaluation_windows,
        tasks=request.tasks,
    )


def _texts(
    request: Request,
    asked: AskedTexts,
    runs: Sequence[GivenRun],
    compute: Compute,
    runner: FunctionRunner,
) -> CompositionTexts:
    found = runner.run(identity, request.source_url, compute.allocation.threads)
    check_identity(runs[0].plan, found, request.source_url, finished=True)
    return read_composition_texts(asked, runs, request.source_url, runner)


def _same_before(root: ObjectStore, request: Request, composing: Composing) -> IntactRun | None:
    """What is published, if it is made of the same blocks by the same measure, and intact."""
    current = find_current(root, request.model, request.recipe_name)
    if current is None or composing.store.exists(PLAN_KEY):
        return None
    store = run_store(root, current.release.run_id)
    try:
        decision = Decision.read(store, Decision.key)
    except (MissingObjectError, DamagedObjectError):
        return None
    if decision.question != composing.question:
        return None
    return intact(root, current.release.run_id)


@contextlib.contextmanager
def _as_catalogs_say() -> Iterator[None]:
    """Let a refusal name what a person can change in a catalog, not options of `compose`."""
    try:
        yield
    except PipelineError as error:
        text = str(error)
        for option in ("--target-bits", "--target-bytes", "--measure-on", "--evaluate-on"):
            text = text.replace(option, option.removeprefix("--").replace("-", "_"))
        if text == str(error):
            raise
        raise type(error)(text) from None
