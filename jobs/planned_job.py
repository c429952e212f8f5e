"""A job's plan as it stands before it runs: what is known of it, and what a dry run says."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from rich.console import Group
from rich.text import Text

from jobs.execute import Compute
from jobs.logging import log_event, print_json
from jobs.plan_summary import plan_table
from jobs.run_costs import PricedMachine, Workers, cost_json, cost_of, cost_table
from jobs.run_exports import ForeseenExports
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import Allocation
from pipeline.plan import Plan
from pipeline.planning.coverage import Coverage
from pipeline.planning.estimates import Estimate, estimate
from pipeline.planning.run_cost import RunCost


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job's plan, and what is known of its result before it is made.

    Attributes:
        windows: to calibrate on, serialized.
        judged_on: what to evaluate the result on.
        priced: where it is costed, in a dry run (see `PricedMachine.find`).
        num_evaluated: windows of text to evaluate on.
        has_tasks: whether there are questions to evaluate it on, too.
        keep_every: blocks between activations kept in storage.
        captured: whether the statistics that it uses, if it does, are there already.
    """

    plan: Plan
    windows: bytes | None
    judged_on: EvaluationSet | None
    exports: ForeseenExports
    priced: Workers | str
    num_evaluated: int
    has_tasks: bool
    keep_every: int
    captured: bool = False

    @cached_property
    def coverage(self) -> Coverage | None:
        """What calibration shows of the model's inputs; None without texts."""
        windows = self.windows
        return None if windows is None else Coverage.read(self.plan, lambda: windows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where that is too little, in words."""
        return () if self.coverage is None else tuple(self.coverage.warnings())

    def warn(self) -> None:
        """Say where calibration shows too little."""
        warn_of_narrow_calibration(self.warnings)


def warn_of_narrow_calibration(warnings: Iterable[str]) -> None:
    """Log what a `Coverage` warns of."""
    for text in warnings:
        log_event("narrow calibration", f"warning: {text}", level=logging.WARNING)


def log_finished_before(output_url: str) -> None:
    """Say that a run was finished before."""
    log_event("finished before", f"{output_url}: finished before; nothing to quantize")


def report_plan(
    planned: PlannedJob,
    compute: Compute,
    dry_run: PricedMachine,
    *,
    finished_at: str,
    as_json: bool,
) -> None:
    """Print a plan and what it would cost, and refuse what would not fit.

    Args:
        finished_at: the URL of the run if it is finished, else "".
    """
    plan, allocation, named = planned.plan, compute.allocation, dry_run.named
    if named is not None:
        plan, allocation, costs = named.plan(plan), named.allocation, named.estimate(plan)
    else:
        costs = estimate(plan, allocation.workers, allocation.gpus)
        if not finished_at:
            costs = compute.placed(costs)
    _print_plan(planned, plan, costs, allocation, as_json=as_json)
    if finished_at:
        log_finished_before(finished_at)
    if named is not None:
        named.check_room(costs)
    elif not finished_at:
        compute.check_room(costs)


def _print_plan(
    planned: PlannedJob,
    plan: Plan,
    costs: Estimate,
    allocation: Allocation,
    *,
    as_json: bool,
) -> None:
    priced = planned.priced
    cost: RunCost | str
    if isinstance(priced, Workers):
        cost = cost_of(
            plan,
            priced,
            num_windows=planned.num_evaluated,
            keep_every=planned.keep_every,
            captured=planned.captured,
        )
    else:
        cost = priced
    values = {
        # Which follows from the weights, too.
        "plan_digest": planned.plan.digest if planned.plan.is_complete else None,
        "share": dataclasses.asdict(plan.share),
        "estimate": dataclasses.asdict(costs) | {"flops": costs.flops},
        **cost_json(cost),
        "coverage": None if planned.coverage is None else planned.coverage.to_dict(),
        "warnings": list(planned.warnings),
    }
    if as_json:
        found = {"plan": planned.plan.content(), "resources": allocation.to_dict()}
        print_json(values | found | planned.exports.to_dict())
        return
    shown = Text(cost) if isinstance(cost, str) else cost_table(cost)
    table = Group(plan_table(plan, costs, allocation, planned.coverage), shown)
    log_event("planned", "", values, table=table)
    planned.exports.show()
    if planned.captured:
        log_event("not counted", "the statistics were captured before, so that is not counted")
    if planned.has_tasks:
        log_event("not counted", "the cost is without the questions of --tasks")
