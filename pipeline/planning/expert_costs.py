"""What experts cost, beyond what their weights do: their inputs, their Hessians, and tokens.

KerasHub computes every token by every expert, and so do GPUs; CPUs leave out what the router does
(`pipeline.worker.routed_products`). The inputs that experts have of their own are not kept, so that
what makes them runs again for each use, and as many of their Hessians are summed at once as take a
gibibyte (`quantizer.experts.expert_passes`).
"""

from __future__ import annotations

from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan
from quantizer.experts import expert_passes, expert_ranges, token_floor

_FLOAT_BYTES = 4
# What experts make of a micro-batch, before and after it is moved or multiplied.
_COPIES = 2
# Experts are written as floats: as decoded, in the file's image, and as that is handed over.
_WRITTEN_COPIES = 3
# Rows of an expert are multiplied in blocks, of which the last is filled up.
_FILLED = 1.5
# Routers send some experts half as many tokens as others, and less.
_UNEVEN = 2


def active_weights(layer: LayerPlan) -> int:
    """Those that a token is multiplied with; of all experts if that is not known."""
    if not layer.experts_per_token:
        return layer.num_weights
    return layer.num_weights // layer.experts * layer.experts_per_token


def run_weights(part: PartPlan, device: str) -> float:
    """Weights of a block that a token is multiplied with, as often as it is."""
    own = {name for group in part.groups if group.experts for name in group.targets}
    repeated = sum(len(_passes(group, part)) for group in part.groups if group.experts)
    routed = device == "cpu" and bool(own)
    total = 0.0
    for layer in part.layers:
        weights: float = layer.num_weights
        if layer.experts and routed:
            weights = min(weights, _FILLED * active_weights(layer))
        if layer.experts and layer.name not in own:
            weights *= 1 + repeated
        total += weights
    return total


def rows_per_token(group: InputGroup, part: PartPlan) -> int:
    """Rows that a token gives a group's input."""
    return _first(group, part).experts_per_token if group.experts else 1


def gram_size(group: InputGroup, part: PartPlan) -> int:
    """Of what is summed at once for a group, in numbers."""
    most = max(map(len, _passes(group, part))) if group.experts else 1
    return most * group.in_features**2


def made_bytes(part: PartPlan) -> int:
    """What the experts of a block make of a token."""
    return _COPIES * _FLOAT_BYTES * sum(x.num_rows for x in part.layers if x.experts)


def written_bytes(part: PartPlan, item: int) -> int:
    """What committing the experts of a part holds.

    Args:
        item: bytes of a weight.
    """
    experts = sum(layer.num_weights for layer in part.layers if layer.experts and layer.scheme)
    return _WRITTEN_COPIES * item * experts


def tokens_per_expert(plan: Plan) -> int:
    """That calibrate an expert with inputs of its own, on average; 0 if there are none."""
    tokens = plan.tokens
    num_tokens = 0 if tokens is None else tokens.num_samples * tokens.sequence_length
    return min((num_tokens * x.experts_per_token // x.experts for x in _routed(plan)), default=0)


def advised_tokens(plan: Plan) -> int:
    """Of calibration, so that most such experts are calibrated well; 0 if there are none."""
    return max(
        (
            -(-_UNEVEN * token_floor(x.in_features) * x.experts // x.experts_per_token)
            for x in _routed(plan)
        ),
        default=0,
    )


def _routed(plan: Plan) -> list[LayerPlan]:
    """The first layer of each group of experts that have inputs of their own."""
    return [_first(g, part) for part in plan.parts for g in part.groups if g.experts]


def _first(group: InputGroup, part: PartPlan) -> LayerPlan:
    return next(layer for layer in part.layers if layer.name == group.targets[0])


def _passes(group: InputGroup, part: PartPlan) -> list[range]:
    """Experts whose Hessians are summed at once."""
    layer = _first(group, part)
    ranges = expert_ranges(layer.experts, layer.slices)
    return [
        range(ranges[together[0]].start, ranges[together[-1]].stop)
        for together in expert_passes(ranges, group.in_features)
    ]
