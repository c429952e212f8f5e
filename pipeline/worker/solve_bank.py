"""Quantize a bank of experts: a layer's variable [experts, in_features, out_features].

Experts that read the same rows are one matrix with the outputs of all of them. Those that read rows
of their own are solved one by one. The float values that stock Keras loads, and all that comes
later in the run, are those of the codes, rounded to the variable's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pipeline.model.targets import Target
from pipeline.plan import LayerPlan
from pipeline.run.solved_layers import SolvedLayer, SolvedSlices
from pipeline.run.worker_api import Values
from quantizer.errors import WeightError
from quantizer.expert_codes import ExpertCodes
from quantizer.expert_solver import join_experts, round_experts, solve_experts
from quantizer.experts import ExpertHessians, expert_ranges
from quantizer.problem import LayerProblem
from quantizer.result import GroupedWeight
from quantizer.schemes import Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import check_layer


def bank_problem(target: Target, scheme: Scheme, values: Values) -> LayerProblem:
    """The matrix of all experts, [experts · out_features, in_features].

    Raises:
        WeightError: names the expert.
    """
    kernel = values[target.kernel_path]
    matrix_RC = target.axes.to_matrix(kernel)
    try:
        return check_layer(matrix_RC, scheme, scale_dtype=str(kernel.dtype), name=target.path)
    except WeightError:
        for number in range(target.num_experts):
            _expert_problem(target, scheme, values, number)
        raise


def _expert_problem(target: Target, scheme: Scheme, values: Values, number: int) -> LayerProblem:
    kernel = values[target.kernel_path]
    return check_layer(
        kernel[number].T,
        scheme,
        scale_dtype=str(kernel.dtype),
        name=f"{target.path}, expert {number}",
    )


def round_bank(target: Target, scheme: Int8Scheme | Int4Scheme, values: Values) -> SolvedLayer:
    """Round a bank to nearest, without calibration."""
    problems = (
        _expert_problem(target, scheme, values, number) for number in range(target.num_experts)
    )
    weight, report = round_experts(problems, scheme)
    return encoded_bank(target, weight, scheme, values, report.to_dict())


def solve_ranges(
    target: Target,
    layer: LayerPlan,
    values: Values,
    statistics: ExpertHessians,
    ranges: Sequence[int],
    *,
    devices: Sequence[jax.Device] = (),
) -> SolvedSlices:
    """Solve some ranges of experts with inputs of their own (see `LayerPlan.slices`)."""
    assert layer.scheme is not None
    bounds = expert_ranges(layer.experts, layer.slices)
    numbers = [number for one in ranges for number in bounds[one]]
    problems = [_expert_problem(target, layer.scheme, values, number) for number in numbers]
    solved = solve_experts(problems, statistics, numbers, devices=devices)
    return SolvedSlices(path=layer.path, experts=dict(zip(numbers, solved, strict=True)))


def join_bank(
    target: Target, layer: LayerPlan, values: Values, parts: Sequence[SolvedSlices]
) -> SolvedLayer:
    """A bank from all ranges of its experts."""
    assert layer.scheme is not None
    experts = {number: one for part in parts for number, one in part.experts.items()}
    weight, report = join_experts([experts[number] for number in range(layer.experts)])
    return encoded_bank(target, weight, layer.scheme, values, report)


def encoded_bank(
    target: Target, weight: GroupedWeight, scheme: Scheme, values: Values, report: dict[str, Any]
) -> SolvedLayer:
    """A bank's result: its codes, and the values that they stand for.

    Args:
        weight: of the matrix of all experts.
    """
    dtype = str(values[target.kernel_path].dtype)
    codes = ExpertCodes.of(weight, scheme, target.num_experts, dtype)
    return SolvedLayer(path=target.path, variables={}, report=report, codes=codes)
