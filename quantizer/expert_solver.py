"""Quantize experts: matrices of one shape, of which each reads rows of its own.

A router sends an expert a share of the tokens. Few rows make a Hessian that fits them and no
others: the fewer, the less the correlations between inputs count, which GPTQ uses to correct
errors, while the energies of the inputs stay (`HessianSum.shrunk`). An expert that no row reached
is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantizer.errors import UnusableStatisticsError
from quantizer.experts import ExpertHessians, token_floor
from quantizer.hessian import HessianSum
from quantizer.problem import LayerProblem
from quantizer.result import (
    Float32,
    GroupedWeight,
    SolveReport,
    SolveResult,
    relative_error,
)
from quantizer.rtn import round_groups
from quantizer.schemes import GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import solve_problems, uncalibrated

EXPERT_SHRINKAGE = 1.0
_NOT_REACHED = "no token of the calibration reached this expert"


@dataclass(frozen=True, slots=True)
class SolvedExpert:
    """One expert's result.

    Attributes:
        weight_energy: sum of the squares of its weights, as they were.
        num_rows: of calibration, that reached it.
        obstacle: why its rows could not be used, so that it is rounded to nearest; "" if they were.
    """

    weight: GroupedWeight
    report: SolveReport
    weight_energy: float
    num_rows: int
    obstacle: str = ""


# Of a Hessian. Larger ones, such as Mixtral's of 0.8 GB, keep all cores busy for most of the time.
_SMALL_BYTES = 32 << 20


def solve_experts(
    problems: Sequence[LayerProblem],
    statistics: ExpertHessians,
    experts: Sequence[int],
    *,
    devices: Sequence[jax.Device] = (),
) -> list[SolvedExpert]:
    """Solve experts by gptq, each alone: the results are those of any other company.

    Experts of moderate size are solved two at a time, since one's factor leaves cores idle that
    another's products can use. One program over a batch of them would take 1.8 to 2.2 times as
    long as one after the other on CPUs, whose products of many small matrices are slow.

    Args:
        problems: of each of the experts.
        experts: their numbers in the statistics.
        devices: those to solve on, in turn; the statistics are on the first.
    """

    def solve(turn: int, problem: LayerProblem, number: int) -> SolvedExpert:
        # Of a device's sum this is a copy, of which no more are needed than are being solved.
        hessian = statistics.of_expert(number)
        place = turn % max(1, len(devices))
        if place == 0:
            return _solve(problem, hessian)
        with jax.default_device(devices[place]):
            gram_CC = jax.device_put(hessian.gram_CC, devices[place])
            return _solve(problem, replace(hessian, gram_CC=gram_CC))

    if len(problems) != len(experts):
        raise ValueError(f"{len(problems)} problems of {len(experts)} experts")
    at_once = concurrent_experts(statistics.gram_ECC.shape[-1]) * max(1, len(devices))
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(solve, range(len(experts)), problems, experts))


def concurrent_experts(in_features: int) -> int:
    """How many experts are solved at once; what this takes beside one is a fraction of a bank."""
    return 2 if 4 * in_features**2 <= _SMALL_BYTES else 1


def _solve(problem: LayerProblem, hessian: HessianSum) -> SolvedExpert:
    num_outputs, num_inputs = problem.weight_RC.shape
    obstacle = "" if hessian.num_rows else _NOT_REACHED
    if not obstacle:
        try:
            [result] = solve_problems([problem], _shrunk(hessian, problem.scheme))
        except UnusableStatisticsError as error:
            obstacle = str(error)
    if obstacle:
        # Uncorrelated inputs: no error can be corrected at another input.
        unit = HessianSum(np.eye(num_inputs, dtype=np.float32), 1)
        [result] = solve_problems([problem], unit)
        report = uncalibrated(result.report, obstacle, num_outputs)
        result = SolveResult(result.weight, report)
    assert isinstance(result.weight, GroupedWeight)
    return SolvedExpert(result.weight, result.report, _energy(problem), hessian.num_rows, obstacle)


def _shrunk(hessian: HessianSum, scheme: Scheme) -> HessianSum:
    """With correlations that count for rows / (rows + inputs), unless the scheme says how much.

    tests/benchmarks/experts.py compares this and other remedies on experts cut from a real model
    (docs/benchmarks.md).
    """
    if isinstance(scheme, GPTQScheme) and scheme.correlation_shrinkage:
        return hessian
    return hessian.shrunk(EXPERT_SHRINKAGE)


def round_experts(
    problems: Iterable[LayerProblem], scheme: Int8Scheme | Int4Scheme
) -> tuple[GroupedWeight, SolveReport]:
    """Round experts to nearest, one at a time.

    No format of Keras holds experts, so that scales are those by which codes are multiplied, as in
    all other formats of groups, also with one scale per output channel (where Keras divides).

    Returns:
        The stacked matrices of all, with unsigned codes, and their report.
    """
    weights, error, energy = [], 0.0, 0.0
    for problem in problems:
        weight = _rounded(problem, scheme)
        weights.append(weight)
        difference_RC = problem.weight_RC - weight.dequantize()
        error += float(np.sum(np.square(difference_RC), dtype=np.float64))
        energy += _energy(problem)
    report = SolveReport(
        weight_error=relative_error(error, energy),
        kept="rtn",
        reason=f"{scheme.mode} rounds to nearest",
        rtn_rows=sum(weight.codes_RC.shape[0] for weight in weights),
    )
    return _stacked(weights), report


def _energy(problem: LayerProblem) -> float:
    return float(np.sum(np.square(problem.weight_RC), dtype=np.float64))


def _stacked(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    return GroupedWeight(
        np.concatenate([one.codes_RC for one in weights]),
        np.concatenate([one.scale_RG for one in weights]),
        np.concatenate([one.zero_RG for one in weights]),
        weights[0].group_C,
    )


def _rounded(problem: LayerProblem, scheme: Int8Scheme | Int4Scheme) -> GroupedWeight:
    weight_RC, dtype = problem.weight_RC, problem.scale_dtype
    if isinstance(scheme, Int4Scheme) and scheme.block_size != -1:
        signed = round_groups(weight_RC, block_size=scheme.block_size, scale_dtype=dtype)
        codes_RC, zero_RG = _unsigned(signed.codes_RC), _unsigned(signed.zero_RG)
        return replace(signed, codes_RC=codes_RC, zero_RG=zero_RG)
    return _round_channels(weight_RC, 8 if isinstance(scheme, Int8Scheme) else 4, dtype)


def _unsigned(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """int4 codes of [-8, 7] as [0, 15]."""
    return (codes + np.int8(8)).view(np.uint8)


def _round_channels(weight_RC: Float32, bits: int, scale_dtype: str) -> GroupedWeight:
    """One symmetric scale per output channel: value = (code - middle) · scale."""
    middle = 2 ** (bits - 1)
    scale_R1 = np.abs(weight_RC).max(1, keepdims=True) / np.float32(middle - 1)
    # A channel of zeros; and what float16 would round to 0.
    scale_R1 = np.maximum(scale_R1, np.float32(ml_dtypes.finfo(scale_dtype).smallest_subnormal))
    scale_R1 = scale_R1.astype(scale_dtype).astype(np.float32)
    codes_RC = np.clip(np.round(weight_RC / scale_R1), 1 - middle, middle - 1) + middle
    return GroupedWeight(
        codes_RC.astype(np.uint8),
        scale_R1,
        np.full(scale_R1.shape, middle, np.uint8),
        np.zeros(weight_RC.shape[1], np.int32),
    )


def join_experts(solved: Sequence[SolvedExpert]) -> tuple[GroupedWeight, dict[str, Any]]:
    """The stacked matrices of all experts, in order, and the report of all of them.

    Returns:
        The report as plain JSON values, as of one layer, with errors weighted by rows (for what
        they are see `HessianSum.shrunk`), and under "experts" how many tokens reached an expert:
        "tokens" is the least, the median and the most; "below_floor" says how many had fewer than
        "floor"; "rounded" names those that were rounded to nearest, by reason.
    """
    weight = _stacked([one.weight for one in solved])
    floor, rows = token_floor(weight.codes_RC.shape[1]), sorted(one.num_rows for one in solved)
    rounded: dict[str, list[int]] = {}
    for number, one in enumerate(solved):
        if one.obstacle:
            rounded.setdefault(one.obstacle, []).append(number)
    experts = {
        "tokens": [rows[0], rows[(len(rows) - 1) // 2], rows[-1]],
        "floor": floor,
        "below_floor": sum(1 for number in rows if number < floor),
        "rounded": rounded,
    }
    return weight, _report(solved).to_dict() | {"experts": experts}


def _report(solved: Sequence[SolvedExpert]) -> SolveReport:
    calibrated = [one for one in solved if not one.obstacle]
    rows = sum(one.num_rows for one in calibrated)

    def mean(field: str) -> float | None:
        sums = [one.num_rows * getattr(one.report, field) for one in calibrated]
        return float(sum(sums)) / rows if rows else None

    channels = sum(one.weight.codes_RC.shape[0] for one in solved)
    rtn_rows = sum(one.report.rtn_rows for one in solved)
    dampings = [one.report.damping for one in calibrated]
    definite = [damping for damping in dampings if damping is not None]
    reason = (
        f"gptq had the lower output error in {channels - rtn_rows} of {channels} output channels "
        f"of {len(solved)} experts, round-to-nearest in {rtn_rows}"
    )
    if not calibrated:
        reason = solved[0].report.reason
    elif len(calibrated) < len(solved):
        reason += f"; {len(solved) - len(calibrated)} experts were not calibrated"
    return SolveReport(
        weight_error=relative_error(
            sum(one.weight_energy * one.report.weight_error**2 for one in solved),
            sum(one.weight_energy for one in solved),
        ),
        output_error=mean("output_error"),
        rtn_output_error=mean("rtn_output_error"),
        kept="gptq" if rtn_rows == 0 else "rtn" if rtn_rows == channels else "gptq+rtn",
        reason=reason,
        rtn_rows=rtn_rows,
        damping=max(definite) if definite and len(definite) == len(dampings) else None,
        dead_inputs=sum(one.report.dead_inputs for one in calibrated),
        faint_inputs=sum(one.report.faint_inputs for one in calibrated),
        num_rows=rows,
    )
