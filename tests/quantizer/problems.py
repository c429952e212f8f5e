"""Weights and inputs to quantize, shaped like real ones: correlated, and unequal in scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantizer.hessian import HessianSum, MagnitudeSum
from tests import reference

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """One layer: its weight and what it was fed."""

    weight_RC: Float32
    inputs_NC: Float32

    @property
    def hessian(self) -> HessianSum:
        return HessianSum.of(self.inputs_NC)

    @property
    def magnitudes(self) -> MagnitudeSum:
        return MagnitudeSum.of(self.inputs_NC)

    @property
    def true_hessian(self) -> reference.Float64:
        """The true Hessian, float64."""
        return reference.hessian_of(self.inputs_NC)


def make(
    out_features: int, in_features: int, num_rows: int, *, dead: int = 0, seed: int = 0
) -> Problem:
    """Inputs mixed from a third as many sources, with scales spread over a decade."""
    rng = np.random.default_rng([seed, out_features, in_features, num_rows])
    sources = rng.standard_normal((num_rows, in_features // 3 + 1))
    mixing = rng.standard_normal((in_features // 3 + 1, in_features)) / np.sqrt(in_features / 3)
    inputs = sources @ mixing + 0.5 * rng.standard_normal((num_rows, in_features))
    inputs *= np.exp(0.7 * rng.standard_normal(in_features))
    inputs[:, rng.choice(in_features, dead, replace=False)] = 0.0
    weight = 0.04 * rng.standard_t(6, (out_features, in_features))
    return Problem(weight.astype(np.float32), inputs.astype(np.float32))


def without_ties(weight_RC: Float32, group_size: int) -> Float32:
    """The weight with the largest of each group positive.

    A symmetric group's largest weight lies half a step outside the codes. A positive one is
    clipped to the last code; a negative one is as far from code 0 as from code 1, and which of
    them a program takes is its rounding noise: no two need agree.
    """
    untied_RC = weight_RC.copy()
    for group in reference.groups_of(weight_RC.shape[1], group_size):
        largest_R1 = np.abs(weight_RC[:, group]).max(1, keepdims=True)
        part_RC = untied_RC[:, group]
        part_RC[part_RC == -largest_R1] *= -1
    return untied_RC


PROBLEMS = {
    "square": make(320, 320, 1024),
    "tall": make(512, 64, 512),
    "wide": make(256, 320, 1024),
    "ragged group": make(192, 200, 512),
    "dead inputs": make(384, 192, 512, dead=7),
    "rank-deficient": make(384, 192, 80),
    "three panels": make(256, 1100, 2048),
    "two slices": make(1100, 64, 512),
}
