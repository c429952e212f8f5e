"""Compositions of a catalog that metadata tells are impossible: found before anything is made.

Their runs are entries of their own, or made for them, and take hours.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from jobs import execute
from jobs.catalog.composition import Composition
from jobs.catalog.request import run_store
from jobs.fleet.catalog_plans import PLANNING_THREADS, CatalogPlans
from jobs.fleet.composition_forecast import foresee_composition
from jobs.fleet.staleness import Decision
from pipeline.errors import PipelineError
from pipeline.executor.protocol import ComputeSpec, FunctionRunner
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore
from quantizer.errors import QuantizationError

_NUM_THREADS = 16


def impossible_compositions(
    root: ObjectStore, stale: Mapping[int, Decision]
) -> dict[int, PipelineError | QuantizationError]:
    """Why compositions could not be made, by their places in the catalog.

    Those whose runs are all there are left out: what these runs are tells more than their plans
    would, and nothing is made for nothing.
    """
    composed = {n: one for n, one in stale.items() if isinstance(one.run.recipe, Composition)}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        there = pool.map(lambda one: _are_there(root, one), composed.values())
        places = [place for place, known in zip(composed, there, strict=True) if not known]
    if not places:
        return {}
    first = composed[places[0]].request

    def check(runner: FunctionRunner) -> dict[int, PipelineError | QuantizationError]:
        plans = CatalogPlans(runner)
        found: dict[int, PipelineError | QuantizationError] = {}
        for place in places:
            request, recipe = composed[place].request, composed[place].run.recipe
            assert isinstance(recipe, Composition)
            givers = zip(request.givers, recipe.recipes, strict=True)
            try:
                foresee_composition(request, [plans.plan(*giver) for giver in givers], "")
            except (PipelineError, QuantizationError) as error:
                found[place] = error
        return found

    # Sizes are the same on all machines, so that this one is asked, and no cluster is joined.
    spec = ComputeSpec(threads=PLANNING_THREADS, device="cpu")
    run_url = root.url(f"runs/{first.run_id}")
    with execute.open_compute(spec, first.source_url, run_url, plan_only=True) as compute:
        return compute.plan(check, with_workers=False)


def _are_there(root: ObjectStore, decision: Decision) -> bool:
    givers = decision.request.givers
    return all(run_store(root, giver.run_id).exists(MANIFEST_KEY) for giver in givers)
