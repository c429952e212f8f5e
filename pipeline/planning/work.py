"""The work that a plan makes, counted: operations, bytes and steps of each stage of a block.

Counts come from the plan alone, layer by layer. What a machine makes of them is
`pipeline.planning.cost_model`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add

from pipeline.calibration.windows import shard_bounds
from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan
from pipeline.planning.estimates import DRIFT_GRAMS, hidden_features, num_streams
from pipeline.planning.expert_costs import rows_per_token, run_weights
from pipeline.planning.micro_batch import micro_batches
from pipeline.planning.solve_costs import GPU_BAND
from pipeline.planning.stage_constants import Constants, Device
from pipeline.planning.stored_sizes import source_bits
from pipeline.planning.tuning import (
    GRADIENT_FORWARDS,
    judged_windows,
    trained_weights,
    trained_windows,
)
from pipeline.tokens_plan import TokensPlan
from quantizer.experts import expert_ranges
from quantizer.schemes import AWQScheme, GPTQScheme

_HEAD_FEATURES = 64
_FLOAT_BYTES = 4
_DRIFT_PRODUCTS = 6
"""Of a weight with matrices over its inputs, to judge and make the correction of its drift."""
# Of the trained weights' arrays, for a micro-batch: decoding, its gradient, sums, and now and then
# an update of all of them.
_TUNING_PASSES = 12.0
_GRAM_SHARE = 10 / 16
"""Of the whole product: above the diagonal in four bands."""


@dataclass(frozen=True)
class Work:
    """What has to be done one after the other, in units that machines have rates for.

    Attributes:
        float32_flops, bfloat16_flops: of large products.
        memory_bytes: read and written in the memory of what computes.
        steps: small kernels, each of which waits for the one before.
        transfer_bytes: between host and device; none on a CPU.
        peer_bytes: from one GPU to another of its node.
        host_bytes: read and written by one thread of the host.
        hash_bytes: hashed by one thread.
        storage_bytes: read from, or written to, storage.
        network_bytes: between two workers.
        rounded_weights: rounded to nearest by the host's threads, with their error.
        seconds: what no rate of a machine changes.
    """

    float32_flops: float = 0.0
    bfloat16_flops: float = 0.0
    memory_bytes: float = 0.0
    steps: float = 0.0
    transfer_bytes: float = 0.0
    peer_bytes: float = 0.0
    host_bytes: float = 0.0
    hash_bytes: float = 0.0
    storage_bytes: float = 0.0
    network_bytes: float = 0.0
    rounded_weights: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))

    @classmethod
    def total(cls, parts: Sequence[Work]) -> Work:
        return reduce(add, parts, cls())


def planned_on(plan: Plan, device: Device) -> Plan:
    """The plan as it would be made where workers have such devices, as far as costs go.

    A GPU takes other micro-batches, larger slices of rows, and runs models of 16 bits as they are.
    Sources of 16 bits are taken for bfloat16, and their attention to be cuDNN's.
    """
    if plan.device == device:
        return plan
    on_gpu = device == "gpu"
    is_16_bit = on_gpu and source_bits(plan) == 16
    tokens = plan.tokens
    if tokens is not None:
        micro_batch, shard = micro_batches(tokens.num_samples, tokens.sequence_length, device)
        tokens = replace(
            tokens,
            micro_batch=micro_batch,
            shards=shard_bounds(tokens.num_samples, shard),
            attention="cudnn" if is_16_bit else "scores",
            largest_array_bytes=_largest_array(plan, micro_batch, is_16_bit=is_16_bit),
        )
    parts = tuple(_sliced(part) for part in plan.parts) if on_gpu else plan.parts
    return replace(
        plan,
        tokens=tokens,
        parts=parts,
        machine={"platform": device, "device": "", "threads": "1"},
        forward_dtype="bfloat16" if is_16_bit else "float32",
    )


def _largest_array(plan: Plan, micro_batch: int, *, is_16_bit: bool) -> int:
    """Of what a GPU computes for a micro-batch: scores, or what the widest layer gives."""
    assert plan.tokens is not None
    num_tokens = micro_batch * plan.tokens.sequence_length
    if not is_16_bit:
        heads = -(-hidden_features(plan) // _HEAD_FEATURES)
        return num_tokens * plan.tokens.sequence_length * heads * _FLOAT_BYTES
    layers = (layer for part in plan.parts[1:] for layer in part.layers)
    return 2 * num_tokens * max(max(x.in_features, x.num_rows) for x in layers)


def _sliced(part: PartPlan) -> PartPlan:
    # A CPU's slices are known where it plans; what is planned on a GPU is not costed on a CPU.
    # Ranges of experts are the same for both.
    own = {name for group in part.groups if group.experts for name in group.targets}
    layers = (
        replace(x, slices=-(-x.num_rows // GPU_BAND))
        if isinstance(x.scheme, GPTQScheme) and x.name not in own
        else x
        for x in part.layers
    )
    return replace(part, layers=tuple(layers))


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """One block's work, and how it is divided among workers.

    Attributes:
        forward, grams: on all calibration windows, which the workers share; forward in every
            model that they pass.
        solve: of each group of layers with one input.
        decode: of all kernels that were solved.
    """

    forward: Work
    grams: Work
    solve: tuple[GroupWork, ...]
    decode: Work


@dataclass(frozen=True, kw_only=True)
class GroupWork:
    """Solving the layers of one input.

    Attributes:
        shared: what every worker that solves any of them does: the factor.
        shared_bytes: of what its GPUs then copy from each other: the factor and the Hessian.
        rows: of each slice of rows, what solving it takes; slices can be anywhere.
        sum_bytes: of the statistics of the input; of a Gram its bands, which travel.
        owned: whether they are added up where they are used, each expert's apart.
    """

    shared: Work
    rows: tuple[Work, ...]
    sum_bytes: int
    shared_bytes: int = 0
    owned: bool = False

    def received_bytes(self, workers: int, levels: int) -> float:
        """Of sums, by the worker that gets most: up the tree, and to where they are used."""
        if self.owned:
            return self.sum_bytes * (workers - 1) / workers
        return self.sum_bytes * (levels + 1)


def block_work(plan: Plan, part: PartPlan, constants: Constants) -> BlockWork:
    """Count a block's work.

    The forward pass runs every layer once on every calibration token. Attention is counted in full,
    as if nothing of its T × T scores were left out, with as many features as the block's hidden
    states.
    """
    on_gpu = plan.device == "gpu"
    grouped = {name for group in part.groups for name in group.targets}
    alone = [x for x in part.layers if x.scheme is not None and x.name not in grouped]
    groups = [
        _experts_work(group, part, constants)
        if group.experts
        else _group_work(group, part, constants, on_gpu=on_gpu)
        for group in part.groups
    ]
    if alone:
        rows = tuple(_rounding(layer) for layer in alone)
        groups.insert(0, GroupWork(shared=Work(), rows=rows, sum_bytes=0))
    solved = [x for x in part.layers if x.scheme is not None and x.kind == "kernel"]
    weights = sum(x.num_weights for x in solved)
    forward, grams = Work(), Work()
    if plan.tokens is not None:
        forward = forward_work(plan, part, plan.tokens, constants) * num_streams(plan)
        grams = Work.total(
            [_gram_work(plan, part, group, plan.tokens, constants) for group in part.groups]
        )
    return BlockWork(
        forward=forward,
        grams=grams,
        solve=tuple(groups),
        decode=Work(memory_bytes=constants.decode_passes * weights * _FLOAT_BYTES),
    )


def forward_work(plan: Plan, part: PartPlan, tokens: TokensPlan, constants: Constants) -> Work:
    """Run a block on all windows."""
    num_tokens = tokens.num_samples * tokens.sequence_length
    hidden = hidden_features(plan)
    linear = 2.0 * run_weights(part, plan.device) * num_tokens
    attention = 4.0 * tokens.sequence_length * hidden * num_tokens
    flops = constants.linear * linear + constants.attention * attention
    bfloat16 = plan.forward_dtype == "bfloat16"
    item = 2 if bfloat16 else _FLOAT_BYTES
    passed = sum(layer.in_features + layer.num_rows for layer in part.layers)
    memory = constants.forward_passes * num_tokens * passed * item
    if plan.device == "gpu" and tokens.attention == "scores":
        # Written, read for the softmax, written and read again.
        heads = -(-hidden // _HEAD_FEATURES)
        memory += 4.0 * num_tokens * tokens.sequence_length * heads * item
    return _products(flops, bfloat16=bfloat16) + Work(memory_bytes=memory)


def tuning_work(plan: Plan, part: PartPlan, constants: Constants) -> Work:
    """Train a block, on one worker."""
    tokens, weights = plan.tokens, trained_weights(part)
    if tokens is None or not trained_windows(plan) or not weights:
        return Work()
    windows = GRADIENT_FORWARDS * trained_windows(plan) + judged_windows(plan)
    forward = forward_work(plan, part, tokens, constants) * (windows / tokens.num_samples)
    batches = windows / tokens.micro_batch
    return forward + Work(memory_bytes=_TUNING_PASSES * batches * weights * _FLOAT_BYTES)


def _gram_work(
    plan: Plan, part: PartPlan, group: InputGroup, tokens: TokensPlan, constants: Constants
) -> Work:
    num_rows = tokens.num_samples * tokens.sequence_length * rows_per_token(group, part)
    bfloat16 = plan.forward_dtype == "bfloat16"
    if group.statistics != "hessian":
        item = 2 if bfloat16 else _FLOAT_BYTES
        return Work(memory_bytes=2.0 * num_rows * group.in_features * item)
    size = float(group.in_features) ** 2 * (_GRAM_SHARE + _drift_products(part, group, tokens))
    num_batches = sum(-(-(b - a) // tokens.micro_batch) for a, b in tokens.shards)
    products = _products(constants.gram * 2.0 * size * num_rows, bfloat16=bfloat16)
    passes = constants.gram_passes * num_batches * max(1, group.experts)
    return products + Work(memory_bytes=passes * size * _FLOAT_BYTES)


def _drift_products(part: PartPlan, group: InputGroup, tokens: TokensPlan) -> float:
    """How many whole products the sums of a group's drift are: one, two of what is held back."""
    return 1 + tokens.num_held_back / tokens.num_samples if part.corrects_drift(group) else 0.0


def _products(flops: float, *, bfloat16: bool) -> Work:
    return Work(bfloat16_flops=flops) if bfloat16 else Work(float32_flops=flops)


def _group_work(
    group: InputGroup, part: PartPlan, constants: Constants, *, on_gpu: bool
) -> GroupWork:
    layers = {layer.name: layer for layer in part.layers}
    targets = [layers[name] for name in group.targets]
    size = group.in_features
    hessian = group.statistics == "hessian"
    needs_factor = hessian and any(isinstance(x.scheme, GPTQScheme) for x in targets)
    shared = _factoring(size, constants, factor=needs_factor) if hessian else Work()
    rows = [
        work
        for layer in targets
        if not (on_gpu and isinstance(layer.scheme, GPTQScheme))
        for work in _sliced_work(layer, hessian=hessian, constants=constants)
    ]
    if on_gpu:
        rows += _banded_work(targets, constants)
    sum_bytes = _FLOAT_BYTES * int(_GRAM_SHARE * size**2 if hessian else 3 * size)
    copied = 2 * _FLOAT_BYTES * size**2 if needs_factor else 0
    if part.corrects_drift(group):
        sum_bytes += int(_FLOAT_BYTES * DRIFT_GRAMS * size**2)
        shared += _correcting([x for x in targets if x.corrects_drift], size)
    return GroupWork(shared=shared, rows=tuple(rows), sum_bytes=sum_bytes, shared_bytes=copied)


def _correcting(targets: Sequence[LayerPlan], size: int) -> Work:
    """Find the step of the drift's correction twice, to judge it and to make it; and do so."""
    steps = 2 * (1 / 3 + 2) * float(size) ** 3
    products = _DRIFT_PRODUCTS * 2.0 * sum(x.num_rows for x in targets) * float(size) ** 2
    return Work(float32_flops=steps + products)


def _factoring(size: int, constants: Constants, *, factor: bool = True) -> Work:
    """What a Hessian takes before any row is solved."""
    return Work(
        # The factor is a third, its blocks' inverses as much again.
        float32_flops=constants.factor * 2 / 3 * float(size) ** 3 if factor else 0.0,
        memory_bytes=6.0 * float(size) ** 2 * _FLOAT_BYTES,
    )


def _experts_work(group: InputGroup, part: PartPlan, constants: Constants) -> GroupWork:
    """Each expert is a factor and a solve of its own; ranges of them can be anywhere."""
    layers = [layer for layer in part.layers if layer.name in group.targets]
    ranges = []
    for layer in layers:
        assert isinstance(layer.scheme, GPTQScheme)
        one = _gptq_rows(layer.in_features, layer.out_features, layer.scheme, constants)
        one += _factoring(group.in_features, constants)
        ranges += [one * len(experts) for experts in expert_ranges(layer.experts, layer.slices)]
    sum_bytes = int(_FLOAT_BYTES * group.experts * _GRAM_SHARE * group.in_features**2)
    return GroupWork(shared=Work(), rows=tuple(ranges), sum_bytes=sum_bytes, owned=True)


def _sliced_work(layer: LayerPlan, *, hessian: bool, constants: Constants) -> list[Work]:
    match layer.scheme:
        case GPTQScheme() as scheme:
            inputs = layer.in_features
            return [_gptq_rows(inputs, rows, scheme, constants) for rows in _heights(layer)]
        case AWQScheme() as scheme:
            # Rounding, then each exponent with 0, of which each searches its ranges anew.
            search = constants.searched_grid_passes if scheme.clip_search else constants.grid_passes
            weights = float(layer.in_features * layer.out_features)
            once = Work(
                float32_flops=2.0 * weights * layer.in_features if hessian else 0.0,
                memory_bytes=(search + constants.decode_passes) * weights * _FLOAT_BYTES,
            )
            return [once * (scheme.num_grid_points + 2)]
        case _:
            return [_rounding(layer)]


def _heights(layer: LayerPlan) -> list[int]:
    """Rows of each slice of a layer."""
    height = -(-layer.num_rows // layer.slices)
    heights = [height] * (layer.num_rows // height)
    rest = layer.num_rows % height
    return [*heights, rest] if rest else heights


def _banded_work(targets: Sequence[LayerPlan], constants: Constants) -> list[Work]:
    """The bands into which a GPU stacks the slices of layers of one input, each filled up."""
    bands: list[tuple[GPTQScheme, int]] = []
    for layer in targets:
        if not isinstance(layer.scheme, GPTQScheme):
            continue
        for height in _heights(layer):
            for number, (scheme, held) in enumerate(bands):
                if scheme == layer.scheme and held + height <= GPU_BAND:
                    bands[number] = scheme, held + height
                    break
            else:
                bands.append((layer.scheme, height))
    inputs = targets[0].in_features
    return [_gptq_rows(inputs, GPU_BAND, scheme, constants) for scheme, _ in bands]


def _gptq_rows(columns: int, rows: int, scheme: GPTQScheme, constants: Constants) -> Work:
    """Solve some rows, as GPTQ and rounded, and go over them again in each sweep.

    Half of each column's products, for GPTQ and for rounding to nearest beside it, are C²·R flops
    each; a sweep has products with all columns, 2·C²·R, and so has a refit of scales before it.
    """
    sweeps = scheme.refinement_sweeps
    refits = sweeps if scheme.scale_refit else 0
    weights = float(columns * rows)
    search = constants.searched_grid_passes if scheme.scale_search else constants.grid_passes
    passes = search + (1 + sweeps) * constants.column_passes
    return Work(
        float32_flops=constants.columns * (1 + sweeps + refits) * 2.0 * weights * columns,
        memory_bytes=passes * weights * _FLOAT_BYTES,
        steps=constants.column_steps * columns * (1 + sweeps),
    )


def _rounding(layer: LayerPlan) -> Work:
    """By the host, whatever else computes."""
    return Work(rounded_weights=layer.num_weights)
