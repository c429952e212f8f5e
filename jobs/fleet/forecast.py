"""What a catalog's runs would take, on the cluster at hand or on machines that the user names.

Nothing but metadata is read. One process plans for all runs that ask for the same of a cluster, and
models of one architecture in one recipe are planned once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from jobs.catalog.composition import Composition
from jobs.catalog.request import Request, run_store
from jobs.execute import Compute, OpenCompute
from jobs.fleet.captured_statistics import are_captured, statistics_of
from jobs.fleet.catalog_plans import PLANNING_THREADS, CatalogPlans
from jobs.fleet.composition_forecast import foresee_composition
from jobs.fleet.past_nights import PastNights
from jobs.fleet.past_runs import correction
from jobs.fleet.staleness import Decision
from jobs.logging import STDERR, log_event, print_table
from jobs.run_costs import (
    CatalogCost,
    PricedMachine,
    Workers,
    cost_json,
    cost_of,
    costs_table,
)
from jobs.run_exports import CATALOG_OPTION, ForeseenExports, foresee_exports
from pipeline.errors import PipelineError
from pipeline.executor.protocol import ComputeSpec, ExecutorError, FunctionRunner
from pipeline.plan import Plan
from pipeline.planning.run_cost import Correction, RunCost
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.recipe.recipe import Recipe
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore
from quantizer.errors import QuantizationError

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run would take.

    Attributes:
        exports: that it would make; None if it is to make none.
        model_cost: what the cost model says, which is shared by all runs that are alike; in words,
            why it is not known.
        correction: of that, by what earlier runs took.
        source_bytes, stored_bytes: that it would read and write, of weights.
    """

    exports: ForeseenExports | None
    model_cost: RunCost | str
    correction: Correction | None = None
    source_bytes: int
    stored_bytes: int

    @property
    def cost(self) -> RunCost | str:
        """Corrected; in words, why it is not known."""
        if self.correction is None or isinstance(self.model_cost, str):
            return self.model_cost
        return self.model_cost.corrected(self.correction)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        sizes = {"source_bytes": self.source_bytes, "stored_bytes": self.stored_bytes}
        exports = {} if self.exports is None else self.exports.to_dict()
        return {**exports, **cost_json(self.cost), "forecast": sizes}


Foreseen: TypeAlias = Forecast | PipelineError | QuantizationError
"""Of one run; or why it cannot be carried out."""


def show(forecasts: Sequence[tuple[str, Forecast]]) -> None:
    """Print what each run, by its name, would take, and all together."""
    for name, one in forecasts:
        if one.exports is not None:
            one.exports.show(name)
    known = [(name, one) for name, one in forecasts if isinstance(one.model_cost, RunCost)]
    if known:
        print_table(STDERR, costs_table(map(_catalog_cost, known)))
    unknown = Counter(one.cost for _, one in forecasts if isinstance(one.cost, str))
    for text, number in unknown.items():
        log_event("cost unknown", f"cost of {number} run(s) unknown: {text}")


def _catalog_cost(named: tuple[str, Forecast]) -> CatalogCost:
    name, one = named
    cost = one.cost
    assert isinstance(cost, RunCost)
    sizes = {"read_bytes": one.source_bytes, "stored_bytes": one.stored_bytes}
    return CatalogCost(name=name, cost=cost, **sizes)


def forecasts(
    root: ObjectStore,
    stale: Mapping[int, Decision],
    open_compute: OpenCompute,
    priced: PricedMachine,
    *,
    in_one_pass: bool,
) -> dict[int, Foreseen]:
    """What each stale run would take, by its place in the catalog.

    Args:
        in_one_pass: whether one process makes them one after another, by workers that stay; and
            not each by a job of its own.
    """
    groups: defaultdict[ComputeSpec, list[int]] = defaultdict(list)
    for place, decision in stale.items():
        groups[_spec(decision, priced)].append(place)
    found: dict[int, Foreseen] = {}
    for spec, places in groups.items():
        first = stale[places[0]].request
        try:
            with open_compute(spec, first.source_url, root.url(f"runs/{first.run_id}")) as compute:
                found |= compute.plan(
                    _finder(root, stale, places, compute, priced, in_one_pass=in_one_pass),
                    with_workers=False,
                )
        except ExecutorError as error:
            # Such as a cluster that has no GPU now.
            found |= dict.fromkeys(places, error)
    return found


def _spec(decision: Decision, priced: PricedMachine) -> ComputeSpec:
    """What to ask of the cluster to plan a run."""
    needs = decision.request.needs
    if priced.named is not None:
        return ComputeSpec(threads=PLANNING_THREADS)
    recipe = decision.run.recipe
    chains = isinstance(recipe, Composition) or recipe.chains_blocks
    return needs if chains else needs.with_one_gpu_each()


def _finder(
    root: ObjectStore,
    decisions: Mapping[int, Decision],
    places: Sequence[int],
    compute: Compute,
    priced: PricedMachine,
    *,
    in_one_pass: bool,
) -> Callable[[FunctionRunner], dict[int, Foreseen]]:
    def find(runner: FunctionRunner) -> dict[int, Foreseen]:
        planner = CatalogPlans(runner)
        at_hand = priced.find(runner, compute.allocation)
        costs = _Costs(root, compute, priced, at_hand)
        found: dict[int, Foreseen] = {}
        published: dict[int, Workers] = {}
        last: tuple[str, ComputeSpec, int] | None = None  # what workers of the run before are for
        for place in places:
            decision = decisions[place]
            before, last = last, None
            try:
                request, recipe = decision.request, decision.run.recipe
                workers = costs.workers(request.needs)
                plan = None
                if not isinstance(recipe, Composition):
                    plan = planner.plan(request, recipe)
                    costs.check_room(plan, request.needs, workers)
                if in_one_pass and isinstance(workers, Workers):
                    together = workers.together if plan is None else workers.together_for(plan)
                    last = request.source_url, request.needs, together
                are_kept = last is not None and last == before
                if isinstance(recipe, Composition):
                    found[place] = _composed(
                        root, request, recipe, planner, workers, are_kept=are_kept
                    )
                    continue
                assert plan is not None
                found[place] = Forecast(
                    exports=_exports(runner, request, recipe),
                    model_cost=workers
                    if isinstance(workers, str)
                    else costs.of(decision, plan, workers, are_kept=are_kept),
                    source_bytes=sum(part.source_bytes for part in plan.parts),
                    stored_bytes=planner.stored_bytes(plan),
                )
                # Only what was published has runs to learn from.
                if decision.release is not None and isinstance(workers, Workers):
                    published[place] = workers
            except (PipelineError, QuantizationError) as error:
                found[place] = error

        def learn(place: int) -> Correction | PipelineError | None:
            try:
                request = decisions[place].request
                past, forecast = correction(root, request, published[place]), found[place]
                if past is None or not isinstance(forecast, Forecast):
                    return past
                assert isinstance(forecast.model_cost, RunCost)
                around = nights.around_seconds(request.model, request.recipe_name)
                return past.with_around(forecast.model_cost, around)
            except PipelineError as error:
                return error

        nights = PastNights.read(root) if published else PastNights(())
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for place, past in zip(published, pool.map(learn, published), strict=True):
                forecast = found[place]
                if isinstance(past, PipelineError):
                    found[place] = past
                elif isinstance(forecast, Forecast):
                    found[place] = dataclasses.replace(forecast, correction=past)
        return found

    return find


def _exports(runner: FunctionRunner, request: Request, recipe: Recipe) -> ForeseenExports | None:
    if not request.exports:
        return None
    return foresee_exports(
        runner,
        request.source_url,
        recipe,
        request.exports,
        dry_run=True,
        option=CATALOG_OPTION,
    )


def _composed(
    root: ObjectStore,
    request: Request,
    composition: Composition,
    planner: CatalogPlans,
    workers: Workers | str,
    *,
    are_kept: bool,
) -> Forecast:
    """What a composition would take, once its runs are there; with those made for it alone.

    Args:
        are_kept: whether the workers are those of the run before, as of `kept_workers`.
    """
    givers = zip(request.givers, composition.recipes, strict=True)
    plans = [planner.plan(giver, recipe) for giver, recipe in givers]
    found = foresee_composition(request, plans, workers)
    cost, source_bytes, written = found.cost, found.source_bytes, found.stored_bytes
    missing = [
        plan
        for plan, giver in zip(plans, request.givers, strict=True)
        if composition.makes_runs and not run_store(root, giver.run_id).exists(MANIFEST_KEY)
    ]
    for number, plan in enumerate(missing):
        source_bytes += sum(part.source_bytes for part in plan.parts)
        written += int(sum(stored_bytes(plan, part) for part in plan.parts))
        if isinstance(workers, Workers) and isinstance(cost, RunCost):
            there = workers.plan(plan)
            captured = number > 0 or len(missing) < len(plans)
            made = cost_of(there, workers, num_windows=0, captured=captured)
            # Its runs and what is composed of them share workers.
            cost = cost.on_kept_workers().after(made)
    if are_kept and isinstance(cost, RunCost):
        cost = cost.on_kept_workers()
    return Forecast(exports=None, model_cost=cost, source_bytes=source_bytes, stored_bytes=written)


class _Costs:
    """What plans cost on the workers that their runs would have; of runs that are alike, once."""

    def __init__(
        self, root: ObjectStore, compute: Compute, priced: PricedMachine, at_hand: Workers | str
    ) -> None:
        """Args: at_hand: workers, or, in words, why they are not known."""
        self._root = root
        self._compute = compute
        self._is_named = priced.named is not None
        self._at_hand = at_hand
        self._fitting: set[tuple[int, ComputeSpec | None]] = set()
        self._found: dict[tuple[int, Workers, int, bool], RunCost] = {}
        self._captured: set[str] = set()

    def workers(self, needs: ComputeSpec) -> Workers | str:
        """Those that a run would have; or why they are not known.

        Raises:
            RatesError: there are not so many.
        """
        if self._is_named and isinstance(self._at_hand, Workers):
            return self._at_hand.for_needs(needs)
        return self._at_hand

    def check_room(self, plan: Plan, needs: ComputeSpec, workers: Workers | str) -> None:
        """Refuse a run that has no room on its workers.

        Raises:
            ExecutorError: it has none.
        """
        key = id(plan), needs if self._is_named else None
        if key in self._fitting:
            return
        if self._is_named and isinstance(workers, Workers):
            workers.check_room(workers.estimate(plan))
        elif not self._is_named and not self._compute.allocation.gpus:  # theirs workers would tell
            self._compute.check_room(self._compute.estimate(plan))
        self._fitting.add(key)

    def of(
        self, decision: Decision, plan: Plan, workers: Workers, *, are_kept: bool = False
    ) -> RunCost:
        """What a run costs; statistics that are not there are made by the first that uses them.

        Args:
            are_kept: whether the workers are those of the run before, as of `kept_workers`.
        """
        request = decision.request
        num_windows = request.evaluation_windows * len(request.evaluated_on.by_name)
        captured = False
        if plan.uses_float_statistics:
            shared = statistics_of(request)
            captured = shared in self._captured or are_captured(
                self._root, request, decision.run.entry.recipes
            )
            self._captured.add(shared)
        key = id(plan), workers, num_windows, captured
        if key not in self._found:
            self._found[key] = cost_of(
                workers.plan(plan), workers, num_windows=num_windows, captured=captured
            )
        cost = self._found[key]
        return cost.on_kept_workers() if are_kept else cost
