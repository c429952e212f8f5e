"""Estimate what a plan costs: bytes read and written, memory of a worker, flops."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan import LayerPlan, PartPlan, Plan
from pipeline.reduction import split
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme

_FLOAT_BYTES = 4
# A process with JAX and Keras before it holds a model, and the programs compiled to calibrate one.
_PROCESS_BYTES = 450 << 20
_PROGRAMS_BYTES = 450 << 20
# The block as read, on the device, quantized and as written, and the next block.
_BLOCK_COPIES = 5
# Everything outside the blocks as read, in float32 to embed, and as written.
_REST_COPIES = 3
# A solve holds weight and Hessian about three times (`tests.benchmarks.memory`).
_SOLVE_COPIES = 3
# A micro-batch's Gram while it is added to a shard's, besides one sum per level of the tree.
_GRAM_COPIES = 6
# A micro-batch inside a layer, and its attention's scores before and after the softmax.
_LAYER_COPIES = 4
_SCORE_COPIES = 2
_HEAD_FEATURES = 64


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The costs of one run.

    Attributes:
        source_bytes: of the source's weights, which are read once.
        result_bytes: of the artifact's weights, roughly.
        activation_bytes: of all calibration shards between two blocks.
        worker_bytes: peak memory of the worker that holds most.
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
    """Estimate the costs of a plan on this many workers."""
    blocks = plan.parts[1:]
    tokens = plan.tokens
    num_tokens = 0 if tokens is None else tokens.num_samples * tokens.sequence_length
    hidden = _hidden(plan)
    activation_bytes = num_tokens * hidden * _FLOAT_BYTES
    return Estimate(
        source_bytes=sum(part.source_bytes for part in plan.parts),
        result_bytes=sum(part.source_bytes - _saved_bytes(part) for part in plan.parts),
        activation_bytes=activation_bytes,
        worker_bytes=_worker_bytes(plan, workers),
        # Every layer runs once, on the output of the quantized ones before it.
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


def _worker_bytes(plan: Plan, workers: int) -> int:
    """The peak of a worker: programs, blocks, statistics or a solve, activations."""
    rest, *blocks = (part.num_weights * _FLOAT_BYTES for part in plan.parts)
    weights = max(_REST_COPIES * rest, _BLOCK_COPIES * max(blocks))
    solve = max(_solve_bytes(part) for part in plan.parts)
    tokens = plan.tokens
    if tokens is None:
        return _PROCESS_BYTES + weights + solve
    num_shards = len(tokens.shards)
    held = max(sum(len(tree.leaves) for tree in share) for share in split(num_shards, workers))
    windows = held * max(stop - start for start, stop in tokens.shards)
    hidden = _hidden(plan)
    widest = max(g.in_features for part in plan.parts for g in part.groups)
    # Between two stages of a block: hidden states, residuals, and the input of the layers.
    activations = windows * tokens.sequence_length * (3 * hidden + widest)
    batch = tokens.micro_batch * tokens.sequence_length
    layer = _LAYER_COPIES * batch * widest
    scores = _SCORE_COPIES * batch * tokens.sequence_length * -(-hidden // _HEAD_FEATURES)
    return (
        _PROCESS_BYTES
        + _PROGRAMS_BYTES
        + weights
        + max(solve, _gram_bytes(plan, num_shards))
        + (activations + max(layer, scores)) * _FLOAT_BYTES
    )


def _gram_bytes(plan: Plan, num_shards: int) -> int:
    sizes = [
        g.in_features**2 for part in plan.parts for g in part.groups if g.statistics == "hessian"
    ]
    return (_GRAM_COPIES + num_shards.bit_length()) * max(sizes, default=0) * _FLOAT_BYTES


def _hidden(plan: Plan) -> int:
    """Features of the hidden states between blocks."""
    sizes = [min((k.in_features for k in _kernels(part)), default=0) for part in plan.parts[1:]]
    return max(sizes, default=0)


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
    """Stored bits of one weight, including its share of scales and zero points."""
    match layer.scheme:
        case (
            GPTQScheme(weight_bits=bits, group_size=size)
            | AWQScheme(weight_bits=bits, group_size=size)
        ):
            return bits + 40 / (layer.in_features if size == -1 else size)
        case Int8Scheme():
            return 8.0
        case Int4Scheme(block_size=size):
            return 4 + 40 / (layer.in_features if size == -1 else size)
        case Float8Scheme() | None:
            return 32.0
