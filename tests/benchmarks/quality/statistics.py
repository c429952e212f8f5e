"""Means and paired differences over windows × calibration draws, with their standard errors.

All draws of a row are judged on the same windows, so both are crossed: a window that is hard for
one draw is hard for all, and a lucky draw is lucky on all windows. For values x[w, s] of W windows
and S draws, with mean squares of the two-way analysis of variance

    MS_w = S Σ_w (x̄[w] − x̄)² / (W − 1)
    MS_s = W Σ_s (x̄[s] − x̄)² / (S − 1)
    MS_e = Σ_ws (x[w, s] − x̄[w] − x̄[s] + x̄)² / ((W − 1)(S − 1))

the variance of the mean x̄ over other windows and other draws is estimated without bias by
(MS_w + MS_s − MS_e) / (W S); where that is below MS_w / (W S), the error clustered by window alone,
the latter is taken. With one draw nothing is known about others, and the error is that by window.
A paired difference is the mean of x[w, s] − y[w, s], for the draws that both rows have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over windows and draws.

    Attributes:
        mean: of all values.
        error: its standard error.
        num_draws: over how many draws; with one the error is blind to others.
    """

    mean: float
    error: float
    num_draws: int


def estimate(values_SW: ArrayLike) -> Estimate:
    """The mean of values [draws, windows] and its standard error.

    Raises:
        ValueError: fewer than two windows, or no draw.
    """
    x_SW: NDArray[np.float64] = np.asarray(values_SW, np.float64)
    if x_SW.ndim != 2 or x_SW.shape[0] < 1 or x_SW.shape[1] < 2:
        raise ValueError(f"values must be [draws, windows >= 2], not {list(x_SW.shape)}")
    num_draws, num_windows = x_SW.shape
    mean = x_SW.mean()
    mean_W, mean_S = x_SW.mean(axis=0), x_SW.mean(axis=1)
    by_window = num_draws * np.sum((mean_W - mean) ** 2) / (num_windows - 1)
    square = by_window
    if num_draws > 1:
        rest_SW = x_SW - mean_W - mean_S[:, None] + mean
        by_draw = num_windows * np.sum((mean_S - mean) ** 2) / (num_draws - 1)
        rest = np.sum(rest_SW**2) / ((num_windows - 1) * (num_draws - 1))
        square = max(by_window, by_window + by_draw - rest)
    error = math.sqrt(square / x_SW.size)
    return Estimate(mean=float(mean), error=error, num_draws=num_draws)


def paired_difference(ours_SW: ArrayLike, theirs_SW: ArrayLike) -> Estimate:
    """Of two rows' values [draws, windows] on the same draws and windows: ours less theirs."""
    ours, theirs = np.asarray(ours_SW, np.float64), np.asarray(theirs_SW, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"unpaired: {list(ours.shape)} and {list(theirs.shape)}")
    return estimate(ours - theirs)
