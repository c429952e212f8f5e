"""Who is asked for what while one block is captured and solved: handles only, no arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.crew import Crew
from pipeline.plan import LayerPlan, PartPlan
from pipeline.reduction import Subtree, join


def solve_in_turn(
    part: PartPlan, block: int, crew: Crew, shares: Sequence[Sequence[Subtree]], values: Any
) -> list[Any]:
    """Handles to the solved layers: those that need no calibration, then group after group.

    Each group is calibrated on what the quantized ones before it give. Its layers, or slices of
    their rows, are solved side by side.
    """
    schemed = {layer.name: layer for layer in part.layers if layer.scheme is not None}
    calibrated = {name for group in part.groups for name in group.targets}
    alone = [layer.path for name, layer in schemed.items() if name not in calibrated]
    solved = [crew.submit(0, "solve", part.part, alone, values, None)] if alone else []
    for stage, group in enumerate(part.groups):
        total = _capture(block, stage, crew, shares, values, solved)
        layers = [schemed[name] for name in group.targets]
        whole, cut = shared(layers, crew.num_workers)
        solved += [
            crew.submit(worker, "solve", part.part, paths, values, total)
            for worker, paths in enumerate(whole)
            if paths
        ]
        slices = [
            crew.submit(worker, "solve_slices", part.part, numbers, values, total)
            for worker, numbers in enumerate(cut)
            if numbers
        ]
        if slices:
            paths = sorted({path for numbers in cut for path in numbers})
            solved.append(crew.submit(0, "join", part.part, paths, values, *slices))
    return solved


def shared(
    layers: Sequence[LayerPlan], num_workers: int
) -> tuple[list[list[str]], list[dict[str, list[int]]]]:
    """Who solves what of some layers of one input: whole layers, and slices of others.

    The costliest slice goes first, each to the worker with the least to do. By worker: paths of
    the layers that it solves alone, and numbers of slices of those that it shares.
    """
    units = [
        (-(-layer.out_features // layer.slices), layer.path, number)
        for layer in layers
        for number in range(layer.slices)
    ]
    load = [0] * num_workers
    taken: list[dict[str, list[int]]] = [{} for _ in load]
    for rows, path, number in sorted(units, key=lambda unit: (-unit[0], unit[1:])):
        worker = load.index(min(load))
        load[worker] += rows
        taken[worker].setdefault(path, []).append(number)
    slices = {layer.path: layer.slices for layer in layers}
    alone = [[path for path in one if len(one[path]) == slices[path]] for one in taken]
    cut = [{path: one[path] for path in one if len(one[path]) < slices[path]} for one in taken]
    return alone, cut


def _capture(
    block: int,
    stage: int,
    crew: Crew,
    shares: Sequence[Sequence[Subtree]],
    values: Any,
    solved: Sequence[Any],
) -> Any:
    """Handle to the sum of one group's input over all shards."""
    by_subtree = [
        (worker, crew.submit(worker, "capture", block, stage, subtree, values, *solved))
        for worker, share in enumerate(shares)
        for subtree in share
    ]
    # The left one's worker adds: its sum need not travel.
    return join(
        by_subtree,
        lambda left, right: (left[0], crew.submit(left[0], "merge", left[1], right[1])),
    )[1]
