"""What a recipe that chooses widths will take and give, as far as plans tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from jobs.composition_costs import cost_of_composition
from jobs.quantities import size
from jobs.run_costs import Workers, cost_of
from pipeline.errors import PipelineError
from pipeline.plan import Plan
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.run.sums_records import statistics_bytes

_LEAST_SHARE = 0.8
"""Of what codes and scales take before they are compressed: less is never left of a block."""


@dataclass(frozen=True, kw_only=True)
class ChoiceOutlook:
    """One choice, as an artifact of its own.

    Attributes:
        block_bytes, num_bytes: of the blocks, and of all weights files, by an estimate.
        bits: of a weight in the blocks.
        seconds: of its run, by the cost model; None where no rates are known.
    """

    recipe: str
    block_bytes: int
    num_bytes: int
    bits: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class AutoOutlook:
    """All choices, and what they take together.

    Attributes:
        target: as the recipe names it.
        target_block_bytes: what that leaves to the blocks, by an estimate.
        statistics_bytes: of the sums that all choices share.
        measure_seconds: of measuring each block of each choice, the choice beside uniform widths,
            and the result on what it is evaluated on; None where no rates are known.
        cost_unknown: why they are not; "" where they are.
    """

    target: str
    target_block_bytes: int
    choices: tuple[ChoiceOutlook, ...]
    statistics_bytes: int
    measure_seconds: float | None
    cost_unknown: str

    @classmethod
    def of(
        cls,
        recipe: AutoRecipe,
        plans: Sequence[Plan],
        priced: Workers | str = "",
        *,
        num_evaluated: int = 0,
    ) -> AutoOutlook:
        """What plans tell.

        Args:
            plans: of the choices, in their order.
            priced: where they are made (see `PricedMachine.find`); words where that is not known.
            num_evaluated: windows that the result is evaluated on.
        """
        weights = sum(part.num_weights for part in plans[0].parts[1:])
        choices = []
        for number, plan in enumerate(plans):
            outside, *blocks = (math.ceil(stored_bytes(plan, part)) for part in plan.parts)
            seconds = None
            if isinstance(priced, Workers):
                made = cost_of(priced.plan(plan), priced, num_windows=0, captured=number > 0)
                seconds = made.seconds
            choices.append(
                ChoiceOutlook(
                    recipe=plan.recipe.name,
                    block_bytes=sum(blocks),
                    num_bytes=outside + sum(blocks),
                    bits=8 * sum(blocks) / weights,
                    seconds=seconds,
                )
            )
        first, scheme = choices[0], recipe.scheme
        bits, num_bytes = scheme.target_bits, scheme.target_bytes
        room = (num_bytes or 0) - (first.num_bytes - first.block_bytes)
        limit = room if bits is None else math.floor(bits * weights / 8)
        measure = None
        if isinstance(priced, Workers):
            costs = cost_of_composition(
                plans,
                priced,
                measure_windows=scheme.measure_windows,
                num_fitting=sum(one.block_bytes <= limit for one in choices),
                by_layers=scheme.by_layers,
            )
            measure = costs.stage("evaluate").seconds
            if num_evaluated:
                last = cost_of(priced.plan(plans[0]), priced, num_windows=num_evaluated)
                measure += last.stage("evaluate").seconds
        return cls(
            target=scheme.target_text,
            target_block_bytes=limit,
            choices=tuple(choices),
            statistics_bytes=statistics_bytes(plans[0]),
            measure_seconds=measure,
            cost_unknown="" if isinstance(priced, Workers) else priced,
        )

    def check_target(self, recipe: AutoRecipe) -> None:
        """Refuse a target that no choice can meet, before anything is made.

        How far files are compressed is known once they are made. Only what is out of reach is
        refused here; the smallest choice is made first, and then the target is checked by it.

        Raises:
            PipelineError: it is too small.
        """
        first = self.choices[0]
        if self.target_block_bytes < _LEAST_SHARE * first.block_bytes:
            raise PipelineError(
                f"recipe {recipe.name}: {self.target}: the blocks at {recipe.scheme.choices[0]} "
                f"bits, the smallest choice, take about {first.bits:.2f} bits a weight with "
                f"scales, {size(first.num_bytes)} with what is outside the blocks; raise the "
                "target, or give choices fewer bits or group_size more inputs"
            )

    @property
    def fitting(self) -> tuple[str, ...]:
        """The choices that are no larger than the target, by their recipes' names."""
        return tuple(
            one.recipe for one in self.choices if one.block_bytes <= self.target_block_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"fitting": list(self.fitting)}

    def table(self) -> Group:
        """All of it, for people."""
        right = [Column(name, justify="right") for name in ("size", "bits a weight", "seconds")]
        table = Table("choice", *right, "", title=f"choices for {self.target}: sizes are estimates")
        fitting = self.fitting
        for one in self.choices:
            seconds = "–" if one.seconds is None else f"{one.seconds:.1f}"
            fits = "within the target" if one.recipe in fitting else "larger than the target"
            table.add_row(Text(one.recipe), size(one.num_bytes), f"{one.bits:.3f}", seconds, fits)
        known = [one.seconds for one in self.choices if one.seconds is not None]
        if self.measure_seconds is not None:
            table.add_section()
            table.add_row("measure, compare", "", "", f"{self.measure_seconds:.1f}", "")
            table.add_row("in all", "", "", f"{sum(known) + self.measure_seconds:.1f}", "")
        lines = [Text(f"statistics, captured once: {size(self.statistics_bytes)}")]
        if not fitting:
            lines.append(
                Text("no choice is surely within the target; the smallest is made first, to tell")
            )
        if self.cost_unknown:
            lines.append(Text(self.cost_unknown))
        return Group(table, *lines)
