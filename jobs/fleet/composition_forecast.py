"""What a composition that a catalog asks for would take, or why it could not be made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.catalog.request import Request
from jobs.composition_costs import cost_of_composition
from jobs.run_costs import Workers
from pipeline.composition.composed_plan import check_plans
from pipeline.errors import PipelineError
from pipeline.plan import Plan
from pipeline.planning.run_cost import RunCost
from pipeline.planning.stored_sizes import stored_bytes

_SLACK = 0.98
"""Sizes are estimates: what is smaller by less is not refused."""


@dataclass(frozen=True, kw_only=True)
class CompositionForecast:
    """What a composition would take.

    Attributes:
        cost: in words, why it is not known.
        source_bytes, stored_bytes: that it would read and write, of weights.
    """

    cost: RunCost | str
    source_bytes: int
    stored_bytes: int


def foresee_composition(
    request: Request, plans: Sequence[Plan], workers: Workers | str
) -> CompositionForecast:
    """What it would take, once its runs are there.

    Args:
        plans: of these, from metadata alone.
        workers: that it would have; in words, why they are not known.

    Raises:
        PipelineError: the runs could not be composed, or the target is too small for any choice.
    """
    asked = request.composed_of
    assert asked is not None
    names = [f"{request.model} × {giver.recipe_name}" for giver in request.givers]
    check_plans(plans, names)
    sizes = [[stored_bytes(plan, part) for part in plan.parts] for plan in plans]
    weights = sum(part.num_weights for part in plans[0].parts[1:])
    outside = sizes[0][0]
    limit = asked.target.bytes_of_blocks(weights, outside)
    blocks = list(zip(*(of_run[1:] for of_run in sizes), strict=True))
    least, most = sum(map(min, blocks)), sum(map(max, blocks))
    if limit < _SLACK * least:
        target = str(asked.target).removeprefix("--").replace("-", "_")
        raise PipelineError(
            f"{target}: the smallest blocks of these recipes take about "
            f"{8 * least / weights:.2f} bits a weight, {math.ceil(least + outside)} bytes with "
            "what is outside the blocks; raise the target, or add a recipe or choice of fewer bits"
        )
    within = sum(1 for of_run in sizes if sum(of_run[1:]) <= limit)
    cost: RunCost | str = workers if isinstance(workers, str) else ""
    if isinstance(workers, Workers):
        cost = cost_of_composition(
            plans,
            workers,
            measure_windows=asked.measure_windows,
            judged_windows=request.evaluation_windows * len(request.evaluated_on.by_name),
            num_fitting=within,
            by_layers=asked.by_layers,
        )
    return CompositionForecast(
        cost=cost,
        source_bytes=sum(part.source_bytes for part in plans[0].parts),
        stored_bytes=math.ceil(outside + max(least, min(limit, most))),
    )
