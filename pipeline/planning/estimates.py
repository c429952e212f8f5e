"""Estimate what a plan costs: bytes read and written, memory of a worker, flops."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipeline.executor.protocol import ActivationPlace
from pipeline.plan import InputGroup, PartPlan, Plan
from pipeline.planning.expert_costs import (
    active_weights,
    advised_tokens,
    gram_size,
    made_bytes,
    rows_per_token,
    run_weights,
    tokens_per_expert,
    written_bytes,
)
from pipeline.planning.solve_costs import SOLVE_COPIES, banded_size, solve_flops, solve_size
from pipeline.planning.stored_sizes import codes_bytes, result_bytes, source_bits
from pipeline.planning.tuning import (
    GRADIENT_FORWARDS,
    judged_windows,
    trained_weights,
    trained_windows,
    tuning_bytes,
    tuning_window_bytes,
)
from pipeline.reduction import split
from pipeline.run.sums_records import statistics_bytes, sums_bytes
from quantizer.schemes import Float8Scheme

_FLOAT_BYTES = 4
# A process with JAX and Keras before it holds a model, and the programs compiled to calibrate one.
_PROCESS_BYTES = 450 << 20
_PROGRAMS_BYTES = 450 << 20
# The block, the next one and the one before, whose commit may go on, as read. The block is on the
# device besides.
_READ_COPIES = 3
# The kernels of the block on the device as decoded, where the float block stays beside them.
_DECODED_COPIES = 1
# Both as quantized, and the one before as written.
_RESULT_COPIES = 3
# Everything outside the blocks as read, in float32 to embed, and as written.
_REST_COPIES = 3
# Of a Gram, what a worker holds until it is solved: the bands from the diagonal on.
_HELD_GRAM = 10 / 16
# What the sums of a group that corrects drift take beside its Gram: Σ(x - x̃)ᵀx̃ twice, of windows
# that are held back and of others; of these also Σ(x - x̃)ᵀ(x - x̃) and a Gram.
DRIFT_GRAMS = 3 + _HELD_GRAM
# To correct it: the Hessian damped, its factor and the step, beside those Grams made whole.
_CORRECTING_GRAMS = 5
# A shard's Gram and a micro-batch's while that is added, besides one sum per level of the tree.
_GRAM_COPIES = 3
# A micro-batch inside a layer, and its attention's scores before and after the softmax; on a GPU
# twice whatever is the largest array, as the compiler reports for blocks of 8B.
_LAYER_COPIES = 4
_SCORE_COPIES = 2
_HEAD_FEATURES = 64
# Of a float block's sums, where these are stored: as bands on the device, for two blocks; and on
# the host as sent, packed, and as a file.
_HELD_SUMS = 3
_SENT_SUMS = 4
DEVICE_PROGRAMS_BYTES = 512 << 20
"""Of a GPU's memory: cuBLAS' workspaces, and what compiled programs keep."""
# Micro-batches that are brought to the device or back while another one is computed.
_IN_FLIGHT = 2
# A shard's Gram and a micro-batch's, without the gaps that memory on the host has.
_DEVICE_GRAM_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The costs of one run.

    Attributes:
        source_bytes: of the source's weights, which are read once.
        result_bytes: of the artifact's weights, roughly; codes_bytes: of the experts' codes, which
            are beside it.
        weights: of all matrices; active_weights: of those that one token is multiplied with.
        tokens_per_expert, advised_tokens: see `pipeline.planning.expert_costs`.
        activation_bytes: of all calibration shards between two blocks.
        held_bytes: of the activations of the worker that holds most, inside a block;
            device_held_bytes of these, of one of its GPUs.
        activations: where they wait between two stages of a block.
        worker_bytes: peak memory of the worker that holds most.
        device_bytes: peak memory of a GPU, the one that holds most; 0 on CPUs, where it is the
            worker's own.
        micro_batch_bytes: of these, what no number of workers lowers: of a micro-batch in a layer.
        statistics_bytes: of the sums that are stored for all recipes, if the run uses such.
        forward_flops, gram_flops, solve_flops, tuning_flops: of all blocks, as they are run.
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
    tuning_flops: float = 0.0
    held_bytes: int = 0
    device_held_bytes: int = 0
    activations: ActivationPlace = "device"
    statistics_bytes: int = 0

    def beside_devices(self) -> Estimate:
        """The costs if activations wait in the workers' host memory, not on their GPUs."""
        assert self.activations == "device"
        return dataclasses.replace(
            self,
            activations="host",
            worker_bytes=self.worker_bytes + self.held_bytes,
            device_bytes=self.device_bytes - self.device_held_bytes,
        )

    @property
    def flops(self) -> float:
        return self.forward_flops + self.gram_flops + self.solve_flops + self.tuning_flops


def estimate(plan: Plan, workers: int, gpus: int = 1) -> Estimate:
    """Estimate the costs of a plan on this many workers, each with so many GPUs if it is for them.

    All are taken to hold calibration shards for themselves.
    """
    gpus = max(1, gpus)
    blocks = plan.parts[1:]
    tokens = plan.tokens
    num_tokens = 0 if tokens is None else tokens.num_samples * tokens.sequence_length
    streams = num_streams(plan)
    return Estimate(
        source_bytes=sum(part.source_bytes for part in plan.parts),
        result_bytes=result_bytes(plan),
        codes_bytes=int(sum(codes_bytes(plan, part) for part in plan.parts)),
        weights=sum(part.num_weights for part in plan.parts),
        active_weights=sum(active_weights(x) for part in plan.parts for x in part.layers),
        tokens_per_expert=tokens_per_expert(plan),
        advised_tokens=advised_tokens(plan),
        activation_bytes=num_tokens * hidden_features(plan) * _activation_bytes(plan) * streams,
        worker_bytes=_worker_bytes(plan, workers),
        held_bytes=0 if tokens is None else _calibration(plan, workers).activation_bytes,
        device_held_bytes=0
        if tokens is None
        else _calibration(plan, workers, gpus).activation_bytes,
        device_bytes=0 if plan.device == "cpu" else _device_bytes(plan, workers, gpus),
        micro_batch_bytes=0 if tokens is None else _calibration(plan, workers).transient_bytes,
        # Every layer runs once, on the output of the quantized ones before it; and in float.
        forward_flops=float(
            sum(2 * run_weights(part, plan.device) * num_tokens * streams for part in blocks)
        ),
        # Above the diagonal in four bands: 10/16 of the whole product. Drifts have no symmetry.
        gram_flops=float(
            sum(
                2
                * group.in_features**2
                * num_tokens
                * rows_per_token(group, part)
                * (10 / 16 + part.corrects_drift(group))
                for group, part in _hessian_groups(plan)
            )
        ),
        solve_flops=float(sum(solve_flops(part) for part in blocks)),
        tuning_flops=float(sum(_tuning_flops(plan, part) for part in blocks)),
        statistics_bytes=statistics_bytes(plan),
    )


def _tuning_flops(plan: Plan, part: PartPlan) -> float:
    """Of the block's products; one without a layer to train is not run."""
    if plan.tokens is None or not trained_weights(part):
        return 0.0
    windows = GRADIENT_FORWARDS * trained_windows(plan) + judged_windows(plan)
    return 2 * run_weights(part, "gpu") * windows * plan.tokens.sequence_length


def _worker_bytes(plan: Plan, workers: int) -> int:
    """The peak of a worker: programs, blocks, statistics or a solve, activations."""
    rest, *blocks = plan.parts
    decoded = (num_streams(plan) - 1) * _DECODED_COPIES * _FLOAT_BYTES
    item = _read_bytes(plan)
    weights = max(
        _REST_COPIES * rest.num_weights * _FLOAT_BYTES,
        *(
            _block_bytes(part, plan.num_blocks, item) + decoded * part.num_weights
            for part in blocks
        ),
    )
    solve = SOLVE_COPIES * _FLOAT_BYTES * max(map(solve_size, plan.parts))
    if plan.tokens is None:
        return _PROCESS_BYTES + weights + solve
    held = _calibration(plan, workers)
    grams = int((_GRAM_COPIES + _HELD_GRAM * held.levels) * held.gram_bytes)
    grams += int((_GRAM_COPIES + held.levels) * DRIFT_GRAMS * held.drift_bytes)
    solve += int((_CORRECTING_GRAMS + DRIFT_GRAMS) * held.drift_bytes)
    solve += int(_HELD_GRAM * held.gram_bytes)
    # What experts make of a micro-batch is gone before any layer is solved.
    made = held.transient_bytes - held.layer_bytes
    tuned, activations = 0, 0
    if plan.device == "cpu":  # on a GPU they are there, as long as they fit
        activations = held.activation_bytes + held.layer_bytes
        grams, tuned = grams + made, held.tuning_bytes + made
    window = plan.tokens.sequence_length * hidden_features(plan) * _activation_bytes(plan)
    written = max((written_bytes(part, item) for part in blocks), default=0)
    return (
        _PROCESS_BYTES
        + _PROGRAMS_BYTES
        + weights
        + tuning_window_bytes(plan, window)
        + max(solve, grams, tuned, written)
        + activations
        + _SENT_SUMS * _stored_sums(plan)
        + (_HELD_SUMS * _stored_sums(plan) if plan.device == "cpu" else 0)
    )


def _device_bytes(plan: Plan, workers: int, gpus: int) -> int:
    """The peak of a GPU, where activations stay between the stages of a block.

    Args:
        gpus: of each worker.
    """
    # Part by part, each array once; a layer is decoded in float32 before it takes its place.
    layer = max(x.in_features * x.num_rows for part in plan.parts for x in part.layers)
    weights = max(part.num_weights for part in plan.parts) * _activation_bytes(plan)
    weights *= num_streams(plan)
    weights += layer * _FLOAT_BYTES
    solve = _FLOAT_BYTES * max(
        max(SOLVE_COPIES * solve_size(part), banded_size(part)) for part in plan.parts
    )
    if plan.tokens is None:
        return DEVICE_PROGRAMS_BYTES + weights + solve
    held = _calibration(plan, workers, gpus)
    # The levels of the tree, and a sum that another GPU of the worker has sent.
    sums = held.levels + (gpus > 1)
    grams = int((_DEVICE_GRAM_COPIES + _HELD_GRAM * sums) * held.gram_bytes)
    grams += int((_DEVICE_GRAM_COPIES + sums) * DRIFT_GRAMS * held.drift_bytes)
    solve += int((_CORRECTING_GRAMS + DRIFT_GRAMS) * held.drift_bytes)
    return (
        DEVICE_PROGRAMS_BYTES
        + weights
        + max(solve + int(_HELD_GRAM * held.gram_bytes), grams, held.tuning_bytes)
        + held.activation_bytes
        + held.in_flight_bytes
        + held.transient_bytes
        + _HELD_SUMS * _stored_sums(plan)
    )


@dataclass(frozen=True, kw_only=True)
class _Calibration:
    """What calibrating a block needs besides its weights, of the worker or GPU that holds most.

    Attributes:
        gram_bytes: of the largest Gram.
        drift_bytes: of the largest Gram of a group that corrects drift; 0 without one.
        levels: of the tree that sums are merged in, each of which may hold one.
        activation_bytes: of all its windows between two stages of a block.
        in_flight_bytes: of the micro-batches that pass between host and device at once.
        transient_bytes: of a micro-batch inside a layer; layer_bytes: inside any but experts.
        tuning_bytes: of what is trained, and of a micro-batch on its way there and back.
    """

    gram_bytes: int
    drift_bytes: int
    levels: int
    activation_bytes: int
    in_flight_bytes: int
    transient_bytes: int
    layer_bytes: int
    tuning_bytes: int


def _calibration(plan: Plan, workers: int, gpus: int = 1) -> _Calibration:
    """Of one of the workers' GPUs, where several of a worker share what it holds."""
    tokens = plan.tokens
    assert tokens is not None
    # As the driver shares them out, and then each worker.
    of_workers = (sum(map(len, share)) for share in split(len(tokens.shards), workers))
    held = max(sum(map(len, share)) for number in of_workers for share in split(number, gpus))
    windows = held * max(stop - start for start, stop in tokens.shards)
    hidden = hidden_features(plan)
    # Inputs that experts have of their own are not kept.
    kept = [g.in_features for part in plan.parts for g in part.groups if not g.experts]
    widest = max(kept, default=hidden)
    batch = tokens.micro_batch * tokens.sequence_length
    scores = attention_scores_bytes(batch, tokens.sequence_length, hidden)
    # Hidden states, residuals, and the input of the layers.
    activations = (3 * hidden + widest) * _activation_bytes(plan) * num_streams(plan)
    transient = micro_batch_bytes(batch, widest, tokens.largest_array_bytes or scores)
    return _Calibration(
        gram_bytes=max((gram_size(*one) for one in _hessian_groups(plan)), default=0)
        * _FLOAT_BYTES,
        drift_bytes=max(
            (gram_size(*one) for one in _hessian_groups(plan) if one[1].corrects_drift(one[0])),
            default=0,
        )
        * _FLOAT_BYTES,
        levels=held.bit_length(),
        activation_bytes=windows * tokens.sequence_length * activations,
        in_flight_bytes=_IN_FLIGHT * batch * activations,
        transient_bytes=max(transient, *(batch * made_bytes(part) for part in plan.parts)),
        layer_bytes=transient,
        tuning_bytes=tuning_bytes(plan, tokens.largest_array_bytes or scores),
    )


def num_streams(plan: Plan) -> int:
    """How many models the calibration windows pass: the quantized, and perhaps the float one."""
    return 2 if plan.has_float_stream else 1


def attention_scores_bytes(num_tokens: int, length: int, hidden: int) -> int:
    """Of attention's scores in float32, for so many tokens in windows of one length."""
    return num_tokens * length * -(-hidden // _HEAD_FEATURES) * _FLOAT_BYTES


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
    # What is captured for all recipes takes in what this one needs.
    return [
        (group, part)
        for part in plan.parts
        for group in part.captured or part.groups
        if group.statistics == "hessian"
    ]


def _stored_sums(plan: Plan) -> int:
    """Of the largest block's sums, where they are stored."""
    if not (plan.uses_float_statistics or plan.makes == "statistics"):
        return 0
    return max(sums_bytes(part.captured or part.groups) for part in plan.parts)


def hidden_features(plan: Plan) -> int:
    """Features of the hidden states between blocks: the fewest that any kernel in a block takes.

    Experts, and layers beside them, may take fewer: there it is what the first kernel takes.
    """
    found = []
    for part in plan.parts[1:]:
        kernels = [x for x in part.layers if x.kind == "kernel" and x.in_features]
        sizes = [layer.in_features for layer in kernels]
        experts = any(layer.experts for layer in kernels)
        found.append(sizes[0] if experts else min(sizes, default=0))
    return max(found)


def _block_bytes(part: PartPlan, num_blocks: int, item: int) -> int:
    """Of all copies of a block that a worker may hold at once, while a block is solved.

    Args:
        item: bytes of a weight as read.
    """
    # Keras keeps codes of a byte or less, but the kernels of float8 in float.
    in_float = sum(
        layer.num_weights
        for layer in part.layers
        if layer.scheme is None or isinstance(layer.scheme, Float8Scheme)
    )
    result = part.num_weights - in_float + in_float * _FLOAT_BYTES
    read = min(_READ_COPIES, num_blocks) * item + _FLOAT_BYTES
    written = written_bytes(part, item) if num_blocks > 1 else 0  # the block's before
    return read * part.num_weights + _RESULT_COPIES * result + written


def _read_bytes(plan: Plan) -> int:
    """Of a weight as a worker reads it: in the model's dtype, which is the source's or wider."""
    narrow = source_bits(plan) == 16 and plan.recipe.dtype != "float32"
    return _FLOAT_BYTES // 2 if narrow else _FLOAT_BYTES
