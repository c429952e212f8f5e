"""Solved row slices of a weight: joined to its result, and reported of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantizer.gptq.column_loop import SolvedSlice
from quantizer.hessian import correlation_share
from quantizer.result import (
    DriftJudgement,
    Float32,
    GroupedWeight,
    SolveReport,
    SolveResult,
    relative_error,
)
from quantizer.schemes import GPTQScheme

_STRIPE = 32


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points (whole), [out_features, groups], and the group of each input."""

    scale_RG: Float32
    zero_RG: Float32
    group_C: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SolvedRows:
    """One solved row slice, in plain arrays that may be sent to another process.

    Attributes:
        damping: that was needed; None if none made H definite.
        dead_inputs: how many inputs were zero in all of calibration.
        faint_inputs: how many had next to no energy (see `hessian.FAINT`).
        num_rows: calibration rows (tokens).
        drift: of the whole layer, if its drift was judged.
    """

    solved: SolvedSlice
    grid: Grid
    damping: float | None
    dead_inputs: int
    num_rows: int
    faint_inputs: int = 0
    drift: DriftJudgement | None = None


def join_slices(weight_RC: Float32, parts: Sequence[SolvedRows], scheme: GPTQScheme) -> SolveResult:
    """A weight's result from all its slices, in order."""
    grouped = GroupedWeight(
        _transposed([np.asarray(part.solved.codes_CR) for part in parts]),
        np.concatenate([part.grid.scale_RG for part in parts]),
        np.concatenate([part.grid.zero_RG for part in parts]).astype(np.uint8),
        parts[0].grid.group_C,
    )
    return SolveResult(grouped, report_of(weight_RC, parts, scheme))


def _transposed(codes: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Codes [in_features, slice] of all slices as one [out_features, in_features]."""
    codes_RC = np.empty((sum(part.shape[1] for part in codes), codes[0].shape[0]), np.uint8)
    a = 0
    for codes_CR in codes:
        b = a + codes_CR.shape[1]
        # In stripes that stay in cache: a plain transposition misses it at every byte.
        for stripe in range(0, codes_CR.shape[0], _STRIPE):
            codes_RC[a:b, stripe : stripe + _STRIPE] = codes_CR[stripe : stripe + _STRIPE].T
        a = b
    return codes_RC


def report_of(
    weight_RC: Float32, parts: Sequence[SolvedRows], scheme: GPTQScheme, *, unfitted: int = 0
) -> SolveReport:
    """The report of one weight, from all its slices.

    Args:
        unfitted: output channels whose scales should have been refitted, and could not be.
    """
    damping = parts[0].damping

    def total(field: str) -> float:
        return float(sum(np.sum(getattr(part.solved, field), dtype=np.float64) for part in parts))

    weight_energy_R = np.einsum("rc,rc->r", weight_RC, weight_RC)
    rows = sum(part.solved.loss_R.shape[0] for part in parts)
    rtn_rows = int(total("rtn_kept_R"))
    if damping is None:
        reason = "the Hessian stayed indefinite at a damping of 1: rounded to nearest"
    else:
        reason = (
            f"gptq had the lower output error in {rows - rtn_rows} of {rows} output channels, "
            f"round-to-nearest in {rtn_rows}"
        )
        if damping > scheme.hessian_damping:
            reason += (
                f"; damping was raised from {scheme.hessian_damping:g} to {damping:g}, "
                "where the Hessian could be factored"
            )
        if scheme.correlation_shrinkage:
            num_rows, in_features = parts[0].num_rows, weight_RC.shape[1]
            share = correlation_share(num_rows, in_features, scheme.correlation_shrinkage)
            reason += f"; correlations between inputs counted for {share:.0%}, also in the errors"
        if unfitted:
            reason += (
                f"; scales of {unfitted} output channels were not refitted: "
                "the stored groups are not runs of one channel's inputs"
            )
    return SolveReport(
        weight_error=relative_error(
            total("weight_error_R"), float(np.sum(weight_energy_R, dtype=np.float64))
        ),
        output_error=total("loss_R"),
        rtn_output_error=total("rtn_loss_R"),
        kept="gptq" if rtn_rows == 0 else "rtn" if rtn_rows == rows else "gptq+rtn",
        reason=reason,
        rtn_rows=rtn_rows,
        damping=damping,
        dead_inputs=parts[0].dead_inputs,
        faint_inputs=parts[0].faint_inputs,
        num_rows=parts[0].num_rows,
        drift=parts[0].drift,
    )
