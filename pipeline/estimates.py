"""What a plan will cost, from its numbers alone: bytes moved, memory of a worker, flops."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan import LayerPlan, PartPlan, Plan
from quantizer.schemes import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    scheme_from_dict,
)

_FLOAT_BYTES = 4
# A process with JAX, Keras and compiled programs, before it holds any model.
_PROCESS_BYTES = 700 << 20
# A solve holds weight and Hessian about three times (`tests.benchmarks.memory`).
_SOLVE_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one run.

    Attributes:
        source_bytes: read of the source's weights, once.
        result_bytes: written, roughly.
        activation_bytes: of all calibration shards between two blocks.
        worker_bytes: peak memory of the worker that has most to hold.
        forward_flops, gram_flops, solve_flops: of all blocks.
    """

    source_bytes: int
    result_bytes: int
    activation_bytes: int
    worker_bytes: int
    forward_flops: float
    gram_flops: float
    solve_flops: float

    @property
    def flops(self) -> float:
        return self.forward_flops + self.gram_flops + self.solve_flops


def estimate(plan: Plan, workers: int) -> Estimate:
    """Estimate a plan on so many workers."""
    blocks = plan.parts[1:]
    tokens = plan.tokens
    num_tokens = 0 if tokens is None else tokens.num_samples * tokens.sequence_length
    hidden = max((min(layer.in_features for layer in _kernels(part)) for part in blocks), default=0)
    activation_bytes = num_tokens * hidden * _FLOAT_BYTES
    weights = max(part.num_weights for part in plan.parts) * _FLOAT_BYTES
    grams = max(
        (sum(g.in_features**2 for g in part.groups) * _FLOAT_BYTES for part in blocks), default=0
    )
    solve = max((_solve_bytes(part) for part in plan.parts), default=0)
    # The block being worked on, the next one, and what the activations of a micro-batch need.
    worker_bytes = (
        _PROCESS_BYTES + 3 * weights + grams + solve + 2 * -(-activation_bytes // max(workers, 1))
    )
    return Estimate(
        source_bytes=sum(part.source_bytes for part in plan.parts),
        result_bytes=sum(part.source_bytes - _saved_bytes(part) for part in plan.parts),
        activation_bytes=activation_bytes,
        worker_bytes=int(worker_bytes),
        # Every layer runs once, on what the quantized ones before it give.
        forward_flops=float(sum(2 * part.num_weights * num_tokens for part in blocks)),
        # Above the diagonal in four bands: 10/16 of the whole product.
        gram_flops=float(
            sum(
                2 * g.in_features**2 * num_tokens * 10 / 16
                for part in blocks
                for g in part.groups
                if g.statistics == "hessian"
            )
        ),
        solve_flops=float(sum(_solve_flops(part) for part in blocks)),
    )


def _kernels(part: PartPlan) -> list[LayerPlan]:
    return [layer for layer in part.layers if layer.kind == "kernel" and layer.in_features]


def _solve_bytes(part: PartPlan) -> int:
    sizes = [
        layer.in_features * layer.out_features + layer.in_features**2
        for layer in part.layers
        if layer.scheme is not None and layer.kind == "kernel"
    ]
    return _SOLVE_COPIES * _FLOAT_BYTES * max(sizes, default=0)


def _solve_flops(part: PartPlan) -> float:
    rows = {layer.name: layer.out_features for layer in part.layers}
    return sum(
        sum(rows[name] for name in g.targets) * g.in_features**2 + 2 / 3 * g.in_features**3
        for g in part.groups
        if g.statistics == "hessian"
    )


def _saved_bytes(part: PartPlan) -> int:
    weights = sum(layer.in_features * layer.out_features for layer in part.layers)
    if not weights:
        return 0
    width = part.source_bytes / weights
    return int(
        sum(
            layer.in_features * layer.out_features * (min(width, 4) - bits_per_weight(layer) / 8)
            for layer in part.layers
            if layer.scheme is not None
        )
    )


def bits_per_weight(layer: LayerPlan) -> float:
    """Stored bits of one weight, with its share of scales and zero points."""
    if layer.scheme is None:
        return 32.0
    match scheme_from_dict(layer.scheme):
        case (
            GPTQScheme(weight_bits=bits, group_size=size)
            | AWQScheme(weight_bits=bits, group_size=size)
        ):
            return bits + 40 / (layer.in_features if size == -1 else size)
        case Int8Scheme():
            return 8.0
        case Int4Scheme(block_size=size):
            return 4 + 40 / (layer.in_features if size == -1 else size)
        case Float8Scheme():
            return 32.0
