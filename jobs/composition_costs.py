"""What a composition costs on workers, as catalogs and recipes that choose widths ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.run_costs import Workers, windows_of_text
from pipeline.plan import Plan
from pipeline.planning.composition_cost import composition_cost
from pipeline.planning.run_cost import RunCost


def cost_of_composition(
    plans: Sequence[Plan],
    workers: Workers,
    *,
    measure_windows: int,
    judged_windows: int = 0,
    num_fitting: int,
    by_layers: bool,
) -> RunCost:
    """What measuring, choosing, comparing and copying cost.

    Args:
        plans: of the runs that give blocks.
        judged_windows: that results are compared on; 0 for those that blocks are measured on.
        num_fitting: how many of the runs are within the target.
    """
    there = [workers.plan(plan) for plan in plans]
    # Windows of text are as long as those that the runs calibrate on.
    calibrated = next((plan for plan in there if plan.tokens is not None), there[0])
    return composition_cost(
        there,
        workers.machine,
        workers.number,
        together=workers.together_for(there[0]),
        measured=windows_of_text(calibrated, measure_windows),
        judged=windows_of_text(calibrated, judged_windows or measure_windows),
        num_fitting=num_fitting,
        by_layers=by_layers,
    )
