"""What solving a part's layers takes: the largest solve's numbers, and flops."""

from __future__ import annotations

from pipeline.plan import LayerPlan, PartPlan
from pipeline.planning.expert_costs import gram_size
from quantizer.schemes import GPTQScheme

GPU_BAND = 2048
"""Output channels that a GPU solves in one loop (`quantizer.gptq.path.BAND`)."""
SOLVE_COPIES = 3
"""How often a solve holds weight and Hessian, about (`tests.benchmarks.memory`)."""
# A GPTQ solve holds its Hessian four times while it is factored; then three times beside two bands
# of rows, with seven arrays of their columns each.
_FACTORED_HESSIANS, _SOLVED_HESSIANS = 4, 3
_BAND_ARRAYS = 2 * 7
# To refit scales, two slices at once each hold the Hessian's rows of so many inputs, or of a whole
# group's, two and a half times (`quantizer.gptq.refit`).
_REFIT_UNIT, _REFIT_COPIES = 512, 2 * 2.5


def solve_size(part: PartPlan) -> int:
    """The largest weight and Hessian of one solve, in numbers."""
    kernels = {x.name: x for x in part.layers if x.scheme and x.kind == "kernel"}
    sizes = [
        (x.in_features, x.num_rows + -(-_beside_solve(x) // SOLVE_COPIES)) for x in kernels.values()
    ]
    # Layers that share foldable input scales are solved at once.
    folded = [group for group in part.groups if group.fold is not None]
    sizes += [(g.in_features, sum(kernels[n].out_features for n in g.targets)) for g in folded]
    solved = [inputs * (outputs + inputs) for inputs, outputs in sizes]
    # Experts are solved one by one, beside the Hessians of those that were summed with them.
    own = [group for group in part.groups if group.experts]
    solved += [kernels[g.targets[0]].num_weights + gram_size(g, part) for g in own]
    return max(solved, default=0)


def _beside_solve(layer: LayerPlan) -> int:
    """What solving a layer holds beside its weight and Hessian, in numbers for each input.

    That is the Hessian with less correlation, and what refits its scales.
    """
    scheme, inputs = layer.scheme, layer.in_features
    if not isinstance(scheme, GPTQScheme):
        return 0
    beside = inputs if scheme.correlation_shrinkage else 0
    if scheme.scale_refit:
        unit = inputs if scheme.group_size == -1 else max(scheme.group_size, _REFIT_UNIT)
        beside += int(_REFIT_COPIES * min(unit, inputs))
    return beside


def banded_size(part: PartPlan) -> int:
    """What solving the part's widest kernel by GPTQ holds on a GPU, in numbers."""
    kernels = [x for x in part.layers if isinstance(x.scheme, GPTQScheme) and x.kind == "kernel"]
    inputs = max((x.in_features for x in kernels), default=0)
    banded = _SOLVED_HESSIANS * inputs + _BAND_ARRAYS * GPU_BAND
    beside = max(map(_beside_solve, kernels), default=0)
    return inputs * (beside + max(_FACTORED_HESSIANS * inputs, banded))


def solve_flops(part: PartPlan) -> float:
    """Of factoring the part's Hessians, and of the column loops."""
    rows = {layer.name: layer.num_rows for layer in part.layers}
    return sum(
        sum(rows[name] for name in g.targets) * g.in_features**2
        + max(1, g.experts) * 2 / 3 * g.in_features**3
        for g in part.groups
        if g.statistics == "hessian"
    )
