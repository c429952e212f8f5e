"""Statistics of the float model, captured once and shared by all recipes.

By default each block is calibrated on the output of the quantized ones before it, so that every
recipe runs the model anew, block after block. With `statistics: float` the float model runs once,
and the sums of xᵀx over every input group of every block are stored. Nothing that a recipe solves
then depends on anything that it solved before: its blocks can be solved in any order, or all at the
same time.

Capturing is a run of its own, with a plan, lease, records and manifest as any other (see
`pipeline.run.driver`), in the folder STATISTICS/<digest of its plan>/. That plan is derived from
the plan of any run that uses the statistics, and names nothing of its recipe but the dtype: source
weights, tokens and how they are divided, versions and machine. So recipes of one model that are
calibrated on the same tokens share a folder.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.plan import LayerPlan, PartPlan, Plan
from pipeline.recipe.recipe import Recipe
from pipeline.storage.object_store import ObjectStore, open_store

STATISTICS_FOLDER = "statistics"
"""Of a catalog's root, for all its runs; of a run that is in none."""


def statistics_plan(plan: Plan) -> Plan:
    """The plan that makes the statistics which a run uses; the same for all runs that share them.

    Args:
        plan: of the run; without its weights' digests the result has none either.
    """
    assert plan.tokens is not None
    assert plan.uses_float_statistics
    # A recipe has to quantize something; of this one only the dtype is used.
    recipe = Recipe.model_validate(
        {"name": "float-statistics", "scheme": {"mode": "int8"}, "dtype": plan.recipe.dtype}
    )
    return replace(
        plan,
        recipe=recipe,
        tokens=replace(plan.tokens, sources=(), held_back_every=0),
        parts=tuple(map(_in_float, plan.parts)),
        policies={},
        weights_format=1,
        notes=(),
        composed=(),
        makes="statistics",
        statistics_url="",
    )


def _in_float(part: PartPlan) -> PartPlan:
    return replace(
        part, layers=tuple(map(_float_layer, part.layers)), groups=part.captured, captured=()
    )


def _float_layer(layer: LayerPlan) -> LayerPlan:
    return replace(layer, scheme=None, note="", slices=1)


def statistics_store(plan: Plan, run_url: str) -> ObjectStore:
    """Where the statistics are that a run uses.

    Args:
        plan: of the run.
        run_url: the run's root, below which they are if the plan names no other folder.
    """
    folder = plan.statistics_url or f"{run_url}/{STATISTICS_FOLDER}"
    return open_store(f"{folder.rstrip('/')}/{statistics_plan(plan).digest}")
