"""How large a plan's results will be in storage: bits of a weight, bytes of a part."""

from __future__ import annotations

from typing import Literal

from pipeline.plan import LayerPlan, PartPlan, Plan
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme


def result_bytes(plan: Plan) -> int:
    """Of all weights as stored."""
    bits = source_bits(plan)
    saved_bits = 0.0
    for part in plan.parts:
        others = 8 * part.source_bytes / bits - part.num_weights
        for layer in part.layers:
            if layer.experts:
                continue  # which are stored as floats
            weights = layer.in_features * layer.out_features
            if layer.kind == "embedding" and others >= weights:
                weights *= 2  # the reverse table of an untied head
            saved_bits += weights * (bits - bits_per_weight(layer, plan, bits))
    return sum(part.source_bytes for part in plan.parts) - int(saved_bits / 8)


def stored_bytes(plan: Plan, part: PartPlan) -> float:
    """Of one part of the artifact, and of its experts' codes."""
    bits = source_bits(plan)
    saved = sum(
        layer.in_features * layer.out_features * (bits - bits_per_weight(layer, plan, bits))
        for layer in part.layers
        if not layer.experts  # which are stored as floats
    )
    return max(part.source_bytes - saved / 8, 0.0) + codes_bytes(plan, part)


def codes_bytes(plan: Plan, part: PartPlan) -> float:
    """Of the codes of a part's experts."""
    bits = source_bits(plan)
    layers = [layer for layer in part.layers if layer.experts and layer.scheme]
    return sum(layer.num_weights * bits_per_weight(layer, plan, bits) / 8 for layer in layers)


def source_bits(plan: Plan) -> Literal[16, 32]:
    """Bits of most weights in the source."""
    ratios = [8 * part.source_bytes / part.num_weights for part in plan.parts if part.num_weights]
    # Parts hold more than their layers' matrices, so that the lowest ratio is closest.
    return 16 if min(ratios, default=32) < 24 else 32


def bits_per_weight(layer: LayerPlan, plan: Plan, source_bits: int) -> float:
    """Stored bits of one weight, including its share of scales and zero points.

    Args:
        source_bits: of a weight in the source, 16 or 32.
    """
    match layer.scheme:
        case (
            GPTQScheme(weight_bits=bits, group_size=size)
            | AWQScheme(weight_bits=bits, group_size=size)
        ):
            return bits + 40 / (layer.in_features if size == -1 else size)
        case Int8Scheme():
            return 8 + 32 / layer.in_features
        case Int4Scheme(block_size=size):
            return 4 + 40 / (layer.in_features if size == -1 else size)
        case Float8Scheme(power_of_two=power_of_two) if plan.weights_format == 2:
            # A float kernel, compressed (see `pipeline.artifact.weights_file`).
            return 8.2 if power_of_two or source_bits == 16 else 11.2
        case Float8Scheme() | None:
            return source_bits
