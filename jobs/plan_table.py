"""A plan as a person reads it, before anything runs."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.quantities import count, size
from pipeline.estimates import Estimate
from pipeline.executor.protocol import Allocation
from pipeline.plan import Plan
from pipeline.recipe.recipe import unmatched_patterns


def plan_table(plan: Plan, costs: Estimate, allocation: Allocation) -> RenderableType:
    """The layers by scheme, the calibration, the costs, and what stays in float and why."""
    layers = Table(title=f"{plan.model}: {plan.num_blocks} blocks, plan {plan.digest[:12]}")
    for name, justify in (
        ("layer", "left"),
        ("scheme", "left"),
        ("in × out", "right"),
        ("row slices", "right"),
        ("of", "right"),
    ):
        layers.add_column(name, justify=justify)  # type: ignore[arg-type]
    kinds: Counter[tuple[str, str, str, int]] = Counter()
    for part in plan.parts:
        for layer in part.layers:
            shape = f"{layer.in_features} × {layer.out_features}" if layer.in_features else "–"
            scheme = layer.scheme.policy if layer.scheme else "float"
            kinds[(layer.name if part.part else layer.path, scheme, shape, layer.slices)] += 1
    for (name, scheme, shape, slices), number in kinds.items():
        layers.add_row(Text(name), Text(scheme), shape, str(slices), str(number))
    notes = {layer.note: layer.path for part in plan.parts for layer in part.layers if layer.note}
    facts = Table(show_header=False, box=None)
    tokens = plan.tokens
    if tokens is not None:
        facts.add_row(
            "calibration",
            f"{tokens.num_samples} windows of {tokens.sequence_length} tokens in "
            f"{len(tokens.shards)} shards (the leaves of the reduction), {tokens.micro_batch} "
            "windows at once",
        )
    facts.add_row("read", size(costs.source_bytes))
    facts.add_row("written, about", size(costs.result_bytes))
    facts.add_row("activations", size(costs.activation_bytes))
    facts.add_row("peak of a worker, about", size(costs.worker_bytes))
    facts.add_row(
        "flops",
        f"{count(costs.flops)} (forward {count(costs.forward_flops)}, Hessians "
        f"{count(costs.gram_flops)}, solving {count(costs.solve_flops)})",
    )
    facts.add_row("workers", f"{allocation.workers} × {allocation.threads} threads")
    lines = [Text(f"left in float: {path}: {note}") for note, path in notes.items()]
    every = [(o.path, o.kind, o.in_features) for part in plan.parts for o in part.layers]
    lines += [
        Text(f"rule without a layer: {pattern!r} decides none; mistyped, or for other models?")
        for pattern in unmatched_patterns(plan.recipe, every)
    ]
    return Group(layers, facts, *lines)
