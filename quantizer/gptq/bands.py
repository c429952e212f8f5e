"""Row slices of layers that share an input, stacked so that one loop solves them.

On a GPU a loop over few rows takes as long as over many (see `path.BAND`), so q, k and v, or gate
and up, go through one. Rows know nothing of each other. Every band is filled up with zeros to the
same height, so that all products have one shape whatever is stacked, and a row has the same bits in
any company: which slices are solved together depends on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizer.gptq.column_loop import SolvedSlice
from quantizer.problem import LayerProblem
from quantizer.result import Float32


def pack(slices: Sequence[LayerProblem], band: int | None) -> list[list[int]]:
    """Numbers of the slices that one loop solves, for each loop; None leaves all of them alone.

    Each joins the first band that has room and scales of the same dtype.
    """
    if band is None:
        return [[number] for number in range(len(slices))]
    bands: list[list[int]] = []
    for number, rows in enumerate(slices):
        for members in bands:
            height = sum(len(slices[member].weight_RC) for member in members)
            alike = slices[members[0]].scale_dtype == rows.scale_dtype
            if alike and height + len(rows.weight_RC) <= band:
                members.append(number)
                break
        else:
            bands.append([number])
    return bands


def stacked(weights: Sequence[Float32], band: int | None, *, filling: float = 0.0) -> Float32:
    """Arrays [slice, …] side by side, transposed and filled up to the band: […, band]."""
    if band is None:
        (weight_RC,) = weights
        return weight_RC.T
    stack_CR = np.full((weights[0].shape[1], band), filling, np.float32)
    a = 0
    for weight_RC in weights:
        b = a + len(weight_RC)
        stack_CR[:, a:b] = weight_RC.T
        a = b
    return stack_CR


def split(solved: SolvedSlice, heights: Sequence[int]) -> list[SolvedSlice]:
    """The slices of a solved stack, in order, without what it was filled up with."""
    ends = np.cumsum(heights)
    return [
        SolvedSlice(*(values[..., b - height : b] for values in solved))
        for b, height in zip(ends, heights, strict=True)
    ]
