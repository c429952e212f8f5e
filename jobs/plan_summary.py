"""A plan as people read it before it runs."""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from jobs.expert_summary import planned_experts
from jobs.quantities import count, size
from jobs.summary import layer_notes, left_in_float, share_text, with_examples
from pipeline.executor.protocol import Allocation
from pipeline.plan import Plan
from pipeline.planning.coverage import Coverage
from pipeline.planning.estimates import Estimate
from pipeline.recipe.recipe import unmatched_patterns
from pipeline.tokens_plan import TokensPlan


def plan_table(
    plan: Plan, costs: Estimate, allocation: Allocation, coverage: Coverage | None = None
) -> RenderableType:
    """A plan before it runs: layers by scheme, calibration, costs, what stays in float and why.

    Args:
        coverage: what its calibration shows of the model's inputs, if that is known.
    """
    layers = Table(
        *("layer", "scheme"),
        *(Column(name, justify="right") for name in ("in × out", "slices", "layers")),
        title=f"{plan.model}: {plan.num_blocks} blocks"
        + (f", plan {plan.digest[:12]}" if plan.is_complete else ""),
    )
    rows: Counter[tuple[str, str, str, int]] = Counter()
    for part in plan.parts:
        for layer in part.layers:
            shape = f"{layer.in_features} × {layer.out_features}" if layer.in_features else "–"
            if layer.experts:
                shape = f"{layer.experts} × {shape}"
            scheme = layer.scheme.policy if layer.scheme else "float"
            rows[
                (_plain(layer.name) if part.part else layer.path, scheme, shape, layer.slices)
            ] += 1
    for (name, scheme, shape, slices), number in rows.items():
        layers.add_row(Text(name), Text(scheme), shape, str(slices), str(number))
    facts = Table(show_header=False, box=None)
    facts.add_row("quantized", share_text(plan.share))
    if (tokens := plan.tokens) is not None:
        held_back = tokens.num_held_back
        facts.add_row(
            "calibration",
            f"{tokens.num_samples} windows of {tokens.sequence_length} tokens in "
            f"{len(tokens.shards)} shards (the leaves of the reduction), {tokens.micro_batch} "
            "windows at once" + (f"; {held_back} are held back, to judge on" if held_back else ""),
        )
        calibration = plan.recipe.calibration
        urls = calibration.text_urls if calibration is not None and tokens.sources else ()
        for url, seen in zip(urls, tokens.sources, strict=True):
            facts.add_row(
                "", Text(f"{seen.num_windows} windows, {count(seen.num_tokens)} tokens of {url}")
            )
        if coverage is not None:
            facts.add_row("calibrated on", coverage.text)
        if plan.device == "gpu":
            facts.add_row("computed in", _forward(plan.forward_dtype, tokens))
    if (tuning := plan.recipe.tuning) is not None and tokens is not None:
        facts.add_row(
            "tuning",
            f"{tuning.steps} steps a block of {max(1, tuning.batch // tokens.micro_batch)} × "
            f"{tokens.micro_batch} windows, judged on {tokens.num_held_back} others",
        )
    for name, text in planned_experts(plan, costs):
        facts.add_row(name, text)
    facts.add_row("read", size(costs.source_bytes))
    facts.add_row("written, about", size(costs.result_bytes))
    if costs.statistics_bytes:
        facts.add_row(
            "statistics",
            f"{size(costs.statistics_bytes)}, captured once for all recipes of the model with the "
            "same tokens",
        )
    waiting = ", beside the GPUs, which have no room for them"
    facts.add_row(
        "activations",
        size(costs.activation_bytes)
        + (", those of the float model too" if plan.has_float_stream else "")
        + (waiting if costs.activations == "host" else ""),
    )
    facts.add_row("peak of a worker, about", size(costs.worker_bytes))
    if costs.device_bytes:
        facts.add_row("peak of its GPU, about", size(costs.device_bytes))
    facts.add_row(
        "flops",
        f"{count(costs.flops)} (forward {count(costs.forward_flops)}, Hessians "
        f"{count(costs.gram_flops)}, solving {count(costs.solve_flops)}"
        + (f", tuning {count(costs.tuning_flops)})" if costs.tuning_flops else ")"),
    )
    facts.add_row("workers", f"{allocation.workers} × {allocation.threads} threads")
    every = [layer for part in plan.parts for layer in part.layers]
    unmatched = unmatched_patterns(plan.recipe, [(o.path, o.kind, o.in_features) for o in every])
    rules = (
        Text(f"rule without a layer: {name!r} matches none; is it mistyped, or for other models?")
        for name in unmatched
    )
    notes = [
        *left_in_float(layer_notes(every, quantized=False)),
        *with_examples(layer_notes(every, quantized=True)),
        *map(Text, plan.notes),
        *(Text(f"warning: {text}") for text in (() if coverage is None else coverage.warnings())),
    ]
    return Group(layers, facts, *notes, *rules)


def _forward(dtype: str, tokens: TokensPlan) -> str:
    """How a GPU computes what calibrates the layers, and what that takes at once."""
    attention = "by cuDNN" if tokens.attention == "cudnn" else "with all its scores in memory"
    return (
        f"{dtype}, attention {attention}; the largest array of a micro-batch has "
        f"{size(tokens.largest_array_bytes)}"
    )


def _plain(name: str) -> str:
    """A layer's name in its block, without the numbers that Keras gave what it is inside of."""
    *parents, own = name.split("/")
    return "/".join([*(re.sub(r"_\d+$", "", parent) for parent in parents), own])
