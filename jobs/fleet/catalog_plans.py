"""Plans of a catalog's runs, from metadata alone: models of one architecture are planned once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.catalog.request import Request
from pipeline.canonical import digest_of
from pipeline.executor.protocol import FunctionRunner
from pipeline.plan import Plan
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.recipe.recipe import Recipe
from pipeline.remote_planning import plan_for_costs

PLANNING_THREADS = 1
"""A worker's plan depends on them only on CPUs, and its work not at all."""


class CatalogPlans:
    """Plans each architecture in each recipe once."""

    def __init__(self, runner: FunctionRunner) -> None:
        self._runner = runner
        self._plans: dict[str, Plan] = {}
        self._stored_bytes: dict[int, int] = {}

    def plan(self, request: Request, recipe: Recipe) -> Plan:
        """A run's plan; that of another model of the same architecture and recipe, if it is known.

        Raises:
            PipelineError, QuantizationError: it cannot be planned.
        """
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
                plan_for_costs, request.source_url, recipe, PLANNING_THREADS
            )
        return self._plans[key]

    def stored_bytes(self, plan: Plan) -> int:
        """Of all its weights files."""
        if id(plan) not in self._stored_bytes:
            parts = (stored_bytes(plan, part) for part in plan.parts)
            self._stored_bytes[id(plan)] = int(sum(parts))
        return self._stored_bytes[id(plan)]


def _shape(request: Request) -> Mapping[str, Any]:
    """A request's recipe but for what it calibrates on."""
    calibration = request.recipe.get("calibration")
    if calibration is None:
        return request.recipe
    return request.recipe | {"calibration": calibration | {"texts": []}}
