"""Solve a whole block on stored statistics: at the schemes of its plan, or at any others.

A block of the float model depends on no other, so this is a function of its weights, its sums and
the schemes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax

from pipeline.model.targets import Target
from pipeline.plan import PartPlan
from pipeline.run.solved_layers import SolvedLayer
from pipeline.run.worker_api import Values
from pipeline.worker.solve import solve_layers
from pipeline.worker.statistics import finished
from pipeline.worker.stored_sums import BlockSums
from quantizer.experts import ExpertHessians
from quantizer.schemes import Scheme


def solve_block(
    targets: Mapping[str, Target],
    part: PartPlan,
    values: Values,
    sums: BlockSums | None,
    *,
    devices: Sequence[jax.Device] = (),
) -> list[SolvedLayer]:
    """Quantize all layers of a part that have a scheme, input after input.

    Args:
        targets: the part's layers, by path.
        part: says which scheme each layer has (see `at_scheme` for others).
        values: the source's arrays of the part.
        sums: of the float block; None of a part that has no calibrated layer.

    Raises:
        QuantizationError: with the layer's path.
    """
    schemed = {layer.name: layer for layer in part.layers if layer.scheme is not None}
    calibrated = {name for group in part.groups for name in group.targets}
    alone = [layer for name, layer in schemed.items() if name not in calibrated]
    solved = solve_layers(targets, alone, values, None, devices=devices)
    for group in part.groups:
        assert sums is not None
        layers = [schemed[name] for name in group.targets]
        statistics = finished(sums.of(group.targets[0]))
        assert not isinstance(statistics, ExpertHessians), "planning refuses experts"
        solved += solve_layers(targets, layers, values, statistics, group.fold, devices=devices)
    return solved


def at_scheme(part: PartPlan, schemes: Mapping[str, Scheme]) -> PartPlan:
    """The same part with other schemes, by layer name, for layers that have one that is calibrated.

    Layers that share an input stay together, so that any of them can be solved at any width.
    """
    calibrated = {name for group in part.groups for name in group.targets}
    unknown = sorted(schemes.keys() - calibrated)
    if unknown:
        raise KeyError(f"{part.name}: {unknown[0]} has no stored statistics in this plan")
    return replace(
        part,
        layers=tuple(
            replace(layer, scheme=schemes[layer.name]) if layer.name in schemes else layer
            for layer in part.layers
        ),
    )
