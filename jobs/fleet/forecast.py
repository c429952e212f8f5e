"""What a catalog's runs would take, on the cluster at hand or on machines that the user names.

Nothing but metadata is read. One process plans for all runs that ask for the same of a cluster, and
models of one architecture in one recipe are planned once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jobs.catalog.composition import Composition
from jobs.catalog.request import Request, run_store
from jobs.execute import Compute, OpenCompute
from jobs.fleet.captured_statistics import are_captured, statistics_of
from jobs.fleet.composition_forecast import foresee_composition
from jobs.fleet.past_runs import correction
from jobs.fleet.staleness import Decision
from jobs.logging import STDERR, log_event, print_table
from jobs.run_costs import CatalogCost, PricedMachine, Workers, cost_of, costs_table
from jobs.run_exports import CATALOG_OPTION, ForeseenExports, foresee_exports
from pipeline.canonical import digest_of
from pipeline.errors import PipelineError
from pipeline.executor.protocol import ComputeSpec, ExecutorError, FunctionRunner
from pipeline.plan import Plan
from pipeline.planning.run_cost import RunCost
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import plan_for_costs
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore
from quantizer.errors import QuantizationError

# A worker's plan depends on them only on CPUs, and its work not at all.
_THREADS = 1


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would take.

    Attributes:
        exports: that it would make; None if it is to make none.
        cost: in words, why it is not known.
        source_bytes, stored_bytes: that it would read and write, of weights.
    """

    exports: ForeseenExports | None
    cost: RunCost | str
    source_bytes: int
    stored_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        sizes = {"source_bytes": self.source_bytes, "stored_bytes": self.stored_bytes}
        exports = {} if self.exports is None else self.exports.to_dict()
        if isinstance(self.cost, str):
            return {**exports, "cost": None, "cost_unknown": self.cost, "forecast": sizes}
        return {**exports, "cost": self.cost.to_dict(), "forecast": sizes}


Foreseen: TypeAlias = Forecast | PipelineError | QuantizationError
"""Of one run; or why it cannot be carried out."""


def show(forecasts: Mapping[str, Forecast]) -> None:
    """Print what each run, by its name, would take, and all together."""
    for name, one in forecasts.items():
        if one.exports is not None:
            one.exports.show(name)
    rows = {
        name: CatalogCost(cost=one.cost, read_bytes=one.source_bytes, stored_bytes=one.stored_bytes)
        for name, one in forecasts.items()
        if isinstance(one.cost, RunCost)
    }
    if rows:
        print_table(STDERR, costs_table(rows))
    for text, names in _unknown(forecasts).items():
        log_event("cost unknown", f"cost of {len(names)} run(s) unknown: {text}")


def _unknown(forecasts: Mapping[str, Forecast]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, one in forecasts.items():
        if isinstance(one.cost, str):
            found[one.cost].append(name)
    return found


def forecasts(
    root: ObjectStore,
    decisions: Sequence[Decision],
    open_compute: OpenCompute,
    priced: PricedMachine,
) -> dict[int, Foreseen]:
    """What each stale run would take, by its place among the decisions."""
    groups: defaultdict[ComputeSpec, list[int]] = defaultdict(list)
    for place, decision in enumerate(decisions):
        if decision.state == "stale":
            groups[_spec(decision, priced)].append(place)
    found: dict[int, Foreseen] = {}
    for spec, places in groups.items():
        first = decisions[places[0]].request
        try:
            with open_compute(spec, first.source_url, root.url(f"runs/{first.run_id}")) as compute:
                found |= compute.plan(
                    _finder(root, decisions, places, compute, priced), with_workers=False
                )
        except ExecutorError as error:
            # Such as a cluster that has no GPU now.
            found |= dict.fromkeys(places, error)
    return found


def _spec(decision: Decision, priced: PricedMachine) -> ComputeSpec:
    """What to ask of the cluster to plan a run."""
    needs = decision.request.needs
    if priced.named is not None:
        return ComputeSpec(threads=_THREADS)
    recipe = decision.run.recipe
    chains = isinstance(recipe, Composition) or recipe.chains_blocks
    return needs if chains else needs.with_one_gpu_each()


def _finder(
    root: ObjectStore,
    decisions: Sequence[Decision],
    places: Sequence[int],
    compute: Compute,
    priced: PricedMachine,
) -> Callable[[FunctionRunner], dict[int, Foreseen]]:
    def find(runner: FunctionRunner) -> dict[int, Foreseen]:
        planner = _Planner(runner)
        at_hand = priced.find(runner, compute.allocation)
        found: dict[int, Foreseen] = {}
        captured: set[str] = set()
        for place in places:
            try:
                request, recipe = decisions[place].request, decisions[place].run.recipe
                if isinstance(recipe, Composition):
                    found[place] = _composed(root, request, recipe, planner, priced, at_hand)
                    continue
                plan = planner.plan(request, recipe)
                if (
                    priced.named is None and not compute.allocation.gpus
                ):  # theirs workers would tell
                    compute.check_room(compute.estimate(plan))
                found[place] = _forecast(
                    root, decisions[place], recipe, plan, runner, priced, at_hand, captured
                )
            except (PipelineError, QuantizationError) as error:
                found[place] = error
        return found

    return find


def _forecast(
    root: ObjectStore,
    decision: Decision,
    recipe: Recipe,
    plan: Plan,
    runner: FunctionRunner,
    priced: PricedMachine,
    at_hand: Workers | str,
    captured: set[str],
) -> Forecast:
    """What one run would take.

    Args:
        captured: statistics that runs before it make; its own are added.
    """
    request, exports = decision.request, None
    if request.exports:
        exports = foresee_exports(
            runner,
            request.source_url,
            recipe,
            request.exports,
            dry_run=True,
            option=CATALOG_OPTION,
        )
    cost: RunCost | str = at_hand if isinstance(at_hand, str) else ""
    if isinstance(at_hand, Workers):
        workers = at_hand if priced.named is None else at_hand.for_needs(request.needs)
        if priced.named is not None:
            workers.check_room(workers.estimate(plan))
        num_windows = request.evaluation_windows * len(request.evaluated_on.by_name)
        shared = statistics_of(request)
        if recipe.uses_float_statistics and are_captured(root, request, decision.run.entry.recipes):
            captured.add(shared)
        cost = cost_of(
            workers.plan(plan), workers, num_windows=num_windows, captured=shared in captured
        )
        captured.add(shared)
        # Only what was published has runs to learn from.
        if decision.current is not None and (past := correction(root, request, workers)):
            cost = cost.corrected(past)
    return Forecast(
        exports=exports,
        cost=cost,
        source_bytes=sum(part.source_bytes for part in plan.parts),
        stored_bytes=int(sum(stored_bytes(plan, part) for part in plan.parts)),
    )


def _composed(
    root: ObjectStore,
    request: Request,
    composition: Composition,
    planner: _Planner,
    priced: PricedMachine,
    at_hand: Workers | str,
) -> Forecast:
    """What a composition would take, once its runs are there; with those made for it alone."""
    givers = zip(request.givers, composition.recipes, strict=True)
    plans = [planner.plan(giver, recipe) for giver, recipe in givers]
    workers = at_hand
    if isinstance(workers, Workers) and priced.named is not None:
        workers = workers.for_needs(request.needs)
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
            cost = cost.after(cost_of(there, workers, num_windows=0, captured=captured))
    return Forecast(exports=None, cost=cost, source_bytes=source_bytes, stored_bytes=written)


class _Planner:
    """Plans each architecture in each recipe once."""

    def __init__(self, runner: FunctionRunner) -> None:
        self._runner = runner
        self._plans: dict[str, Plan] = {}

    def plan(self, request: Request, recipe: Recipe) -> Plan:
        # What a model is, is told by its JSON; that of shards names each of its variables.
        files = {
            name: token
            for name, token in request.source.items()
            if name.endswith(".json") and "tokenizer" not in name and "vocab" not in name
        }
        # And the names of all: a folder without weights is not its neighbour.
        key = digest_of(
            {
                "files": files,
                "names": sorted(request.source),
                "recipe": _shape(request),
                "kind": request.needs.device,
            }
        )
        if key not in self._plans:
            self._plans[key] = self._runner.run(
                plan_for_costs, request.source_url, recipe, _THREADS
            )
        return self._plans[key]


def _shape(request: Request) -> Mapping[str, Any]:
    """A request's recipe but for what it calibrates on."""
    calibration = request.recipe.get("calibration")
    if calibration is None:
        return request.recipe
    return request.recipe | {"calibration": calibration | {"texts": []}}
