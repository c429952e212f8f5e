"""Estimate what a plan costs: bytes read and written, memory of a worker, flops."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan
from pipeline.reduction import split
from quantizer.expert_solver import token_floor
from quantizer.experts import expert_passes, expert_ranges
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
# Of a Gram, what a worker holds until it is solved: the bands from the diagonal on.
_HELD_GRAM = 10 / 16
# A shard's Gram and a micro-batch's while that is added, besides one sum per level of the tree.
_GRAM_COPIES = 3
# A micro-batch inside a layer, and its attention's scores before and after the softmax; on a GPU
# twice whatever is the largest array, as the compiler reports for blocks of 8B.
_LAYER_COPIES = 4
_SCORE_COPIES = 2
_HEAD_FEATURES = 64
# What experts make of a micro-batch, before and after it is moved or multiplied.
_EXPERT_COPIES = 2
# Routers send some experts half as many tokens as others, and less.
_UNEVEN = 2
# Of a GPU's memory: cuBLAS' workspaces, and what compiled programs keep.
_DEVICE_PROGRAMS_BYTES = 512 << 20
# The block with the kernels that are solved so far, and as it was before.
_DEVICE_BLOCK_COPIES = 2
# The same, without the gaps that memory on the host has.
_DEVICE_GRAM_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The costs of one run.

    Attributes:
        source_bytes: of the source's weights, which are read once.
        result_bytes: of the artifact's weights, roughly; codes_bytes: of the experts' codes, which
            are beside it.
        weights: of all matrices; active_weights: of those that one token is multiplied with.
        tokens_per_expert: that calibrate an expert with inputs of its own, on average; 0 if there
            are none, or not calibrated.
        advised_tokens: of calibration, so that most of these experts are calibrated well; 0 as for
            tokens_per_expert.
        activation_bytes: of all calibration shards between two blocks.
        worker_bytes: peak memory of the worker that holds most.
        device_bytes: peak memory of that worker's GPU; 0 on CPUs, where it is the worker's own.
        micro_batch_bytes: of these, what no number of workers lowers: of a micro-batch in a layer.
        forward_flops, gram_flops, solve_flops: of all blocks. KerasHub computes every token by
            every expert, and those before the experts' own inputs are computed again for each use.
    """

    source_bytes: int
    result_bytes: int
    codes_bytes: int
    weights: int
    active_weights: int
    tokens_per_expert: int
    advised_tokens: int
    activation_bytes: int
    worker_bytes: int
    device_bytes: int
    micro_batch_bytes: int
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
    return Estimate(
        source_bytes=sum(part.source_bytes for part in plan.parts),
        result_bytes=_result_bytes(plan),
        codes_bytes=_codes_bytes(plan),
        weights=sum(part.num_weights for part in plan.parts),
        active_weights=sum(_active(layer) for part in plan.parts for layer in part.layers),
        tokens_per_expert=min(
            (num_tokens * x.experts_per_token // x.experts for x in _routed(plan)), default=0
        ),
        advised_tokens=max(map(_advised_tokens, _routed(plan)), default=0),
        activation_bytes=num_tokens * _hidden(plan) * _activation_bytes(plan),
        worker_bytes=_worker_bytes(plan, workers),
        device_bytes=0 if plan.device == "cpu" else _device_bytes(plan, workers),
        micro_batch_bytes=0 if tokens is None else _calibration(plan, workers).transient_bytes,
        # Every layer runs once, on the output of the quantized ones before it.
        forward_flops=float(sum(2 * _run_weights(part) * num_tokens for part in blocks)),
        # Above the diagonal in four bands: 10/16 of the whole product.
        gram_flops=float(
            sum(
                2 * group.in_features**2 * num_tokens * _uses(group, part) * 10 / 16
                for part in blocks
                for group in part.groups
                if group.statistics == "hessian"
            )
        ),
        solve_flops=float(sum(_solve_flops(part) for part in blocks)),
    )


def _worker_bytes(plan: Plan, workers: int) -> int:
    """The peak of a worker: programs, blocks, statistics or a solve, activations."""
    rest, *blocks = (part.num_weights * _FLOAT_BYTES for part in plan.parts)
    weights = max(_REST_COPIES * rest, _BLOCK_COPIES * max(blocks))
    solve = _SOLVE_COPIES * _FLOAT_BYTES * max(map(_solve_size, plan.parts))
    if plan.tokens is None:
        return _PROCESS_BYTES + weights + solve
    held = _calibration(plan, workers)
    grams = int((_GRAM_COPIES + _HELD_GRAM * held.levels) * held.gram_bytes)
    return (
        _PROCESS_BYTES
        + _PROGRAMS_BYTES
        + weights
        + max(solve + int(_HELD_GRAM * held.gram_bytes), grams)
        + held.activation_bytes
        + held.transient_bytes
    )


def _device_bytes(plan: Plan, workers: int) -> int:
    """The peak of a worker's GPU, where activations stay between the stages of a block."""
    rest, *blocks = (part.num_weights * _FLOAT_BYTES for part in plan.parts)
    weights = max(rest, _DEVICE_BLOCK_COPIES * max(blocks))
    solve = _SOLVE_COPIES * _FLOAT_BYTES * max(map(_solve_size, plan.parts))
    if plan.tokens is None:
        return _DEVICE_PROGRAMS_BYTES + weights + solve
    held = _calibration(plan, workers)
    grams = int((_DEVICE_GRAM_COPIES + _HELD_GRAM * held.levels) * held.gram_bytes)
    return (
        _DEVICE_PROGRAMS_BYTES
        + weights
        + max(solve + int(_HELD_GRAM * held.gram_bytes), grams)
        + held.activation_bytes
        + held.transient_bytes
    )


@dataclass(frozen=True, kw_only=True)
class _Calibration:
    """What calibrating a block needs besides its weights, of the worker that holds most.

    Attributes:
        gram_bytes: of the largest Gram.
        levels: of the tree that sums are merged in, each of which may hold one.
        activation_bytes: of all its windows between two stages of a block.
        transient_bytes: of a micro-batch inside a layer.
    """

    gram_bytes: int
    levels: int
    activation_bytes: int
    transient_bytes: int


def _calibration(plan: Plan, workers: int) -> _Calibration:
    tokens = plan.tokens
    assert tokens is not None
    held = max(sum(map(len, share)) for share in split(len(tokens.shards), workers))
    windows = held * max(stop - start for start, stop in tokens.shards)
    hidden = _hidden(plan)
    # Inputs that experts have of their own are not kept.
    groups = [group for part in plan.parts for group in part.groups]
    widest = max(group.in_features for group in groups if not group.experts)
    batch = tokens.micro_batch * tokens.sequence_length
    heads = -(-hidden // _HEAD_FEATURES)
    scores = batch * tokens.sequence_length * heads * _FLOAT_BYTES
    transient = micro_batch_bytes(batch, widest, tokens.largest_array_bytes or scores)
    return _Calibration(
        gram_bytes=max((_gram_size(*one) for one in _hessian_groups(plan)), default=0)
        * _FLOAT_BYTES,
        levels=held.bit_length(),
        # Hidden states, residuals, and the input of the layers.
        activation_bytes=windows
        * tokens.sequence_length
        * (3 * hidden + widest)
        * _activation_bytes(plan),
        transient_bytes=max(transient, *(batch * _expert_bytes(part) for part in plan.parts)),
    )


def micro_batch_bytes(num_tokens: int, widest: int, largest_array_bytes: int) -> int:
    """What a block needs for a micro-batch, beside its weights and what it takes and gives.

    Args:
        widest: of its layers, in input features.
        largest_array_bytes: of the largest array in it.
    """
    layer = _LAYER_COPIES * num_tokens * widest * _FLOAT_BYTES
    return max(layer, _SCORE_COPIES * largest_array_bytes)


def _activation_bytes(plan: Plan) -> int:
    """Of a number of the activations."""
    return _FLOAT_BYTES if plan.forward_dtype == "float32" else _FLOAT_BYTES // 2


def _hessian_groups(plan: Plan) -> list[tuple[InputGroup, PartPlan]]:
    return [(g, part) for part in plan.parts for g in part.groups if g.statistics == "hessian"]


def _gram_size(group: InputGroup, part: PartPlan) -> int:
    """Of what is summed at once for a group, in numbers."""
    most = 1
    if group.experts:
        layer = _first(group, part)
        ranges = expert_ranges(layer.experts, layer.slices)
        passes = expert_passes(ranges, group.in_features)
        most = max(sum(len(ranges[number]) for number in together) for together in passes)
    return most * group.in_features**2


def _first(group: InputGroup, part: PartPlan) -> LayerPlan:
    return next(layer for layer in part.layers if layer.name == group.targets[0])


def _uses(group: InputGroup, part: PartPlan) -> int:
    """Rows that a token gives a group's input."""
    return _first(group, part).experts_per_token if group.experts else 1


def _routed(plan: Plan) -> list[LayerPlan]:
    """The first layer of each group of experts that have inputs of their own."""
    return [_first(group, part) for group, part in _hessian_groups(plan) if group.experts]


def _advised_tokens(layer: LayerPlan) -> int:
    floor = _UNEVEN * token_floor(layer.in_features)
    return -(-floor * layer.experts // layer.experts_per_token)


def _active(layer: LayerPlan) -> int:
    """Weights of a layer that a token is multiplied with; of all experts if that is not known."""
    if not layer.experts_per_token:
        return layer.num_weights
    return layer.num_weights // layer.experts * layer.experts_per_token


def _run_weights(part: PartPlan) -> int:
    """Weights of a block that its tokens are multiplied with, as often as they are."""
    own = {name: group for group in part.groups if group.experts for name in group.targets}
    before = sum(x.num_weights for x in part.layers if x.experts and x.name not in own)
    again = 0
    for group in part.groups:
        if group.experts:
            layer = _first(group, part)
            ranges = expert_ranges(layer.experts, layer.slices)
            again += before * len(expert_passes(ranges, group.in_features))
    return part.num_weights + again


def _expert_bytes(part: PartPlan) -> int:
    """What the experts of a block make of a token."""
    outputs = sum(layer.experts * layer.out_features for layer in part.layers)
    return _EXPERT_COPIES * outputs * _FLOAT_BYTES


def _hidden(plan: Plan) -> int:
    """Features of the hidden states between blocks: the fewest that any kernel in a block takes.

    Experts, and layers beside them, may take fewer: there it is what the first kernel takes.
    """
    kernels = [[x for x in part.layers if x.kind == "kernel"] for part in plan.parts[1:]]
    found = []
    for block in kernels:
        sizes = [layer.in_features for layer in block if layer.in_features]
        experts = any(layer.experts for layer in block)
        found.append(sizes[0] if experts else min(sizes, default=0))
    return max(found)


def _solve_size(part: PartPlan) -> int:
    """The largest weight and Hessian of one solve, in numbers."""
    kernels = {x.name: x for x in part.layers if x.scheme and x.kind == "kernel"}
    sizes = [(x.in_features, x.out_features * max(1, x.experts)) for x in kernels.values()]
    # Layers that share foldable input scales are solved at once.
    folded = [group for group in part.groups if group.fold is not None]
    sizes += [(g.in_features, sum(kernels[n].out_features for n in g.targets)) for g in folded]
    solved = [inputs * (outputs + inputs) for inputs, outputs in sizes]
    # Experts are solved one by one, beside the Hessians of those that were summed with them.
    own = [(_first(group, part), group) for group in part.groups if group.experts]
    solved += [x.num_weights + _gram_size(group, part) for x, group in own]
    return max(solved, default=0)


def _solve_flops(part: PartPlan) -> float:
    rows = {layer.name: layer.out_features * max(1, layer.experts) for layer in part.layers}
    return sum(
        sum(rows[name] for name in g.targets) * g.in_features**2
        + max(1, g.experts) * 2 / 3 * g.in_features**3
        for g in part.groups
        if g.statistics == "hessian"
    )


def _source_bits(plan: Plan) -> int:
    """Of a weight in the source."""
    ratios = [8 * part.source_bytes / part.num_weights for part in plan.parts if part.num_weights]
    # Parts hold more than their layers' matrices, so that the lowest ratio is closest.
    return 16 if min(ratios, default=32) < 24 else 32


def _codes_bytes(plan: Plan) -> int:
    layers = [x for part in plan.parts for x in part.layers if x.experts and x.scheme]
    source_bits = _source_bits(plan)
    return int(sum(x.num_weights * bits_per_weight(x, plan, source_bits) / 8 for x in layers))


def _result_bytes(plan: Plan) -> int:
    source_bits = _source_bits(plan)
    saved_bits = 0.0
    for part in plan.parts:
        others = 8 * part.source_bytes / source_bits - part.num_weights
        for layer in part.layers:
            if layer.experts:
                continue  # which are stored as floats
            weights = layer.in_features * layer.out_features
            if layer.kind == "embedding" and others >= weights:
                weights *= 2  # the reverse table of an untied head
            saved_bits += weights * (source_bits - bits_per_weight(layer, plan, source_bits))
    return sum(part.source_bytes for part in plan.parts) - int(saved_bits / 8)


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
