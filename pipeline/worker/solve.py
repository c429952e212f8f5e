"""Quantize the layers of one part: kernel → matrix → solve → encode.

Kernels that share an input are solved together, embeddings alone; a bank of experts that share an
input is a kernel as well (for what differs see `pipeline.worker.solve_bank`). GPTQ's programs are
compiled in a thread, while the worker does what comes before solving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from pipeline.fold import Fold
from pipeline.model.targets import Target
from pipeline.plan import LayerPlan, Plan
from pipeline.run.solved_layers import SolvedLayer, SolvedSlices
from pipeline.run.worker_api import Values
from pipeline.worker.memory import make_room
from pipeline.worker.solve_bank import (
    bank_problem,
    encoded_bank,
    join_bank,
    round_bank,
    solve_ranges,
)
from quantizer.errors import UnusableStatisticsError
from quantizer.experts import ExpertHessians, InputStatistics
from quantizer.gptq.drift import Drift, DriftSum, JudgedDrift
from quantizer.gptq.solve import compile_solver
from quantizer.gptq.solved_rows import SolvedRows, join_slices
from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum
from quantizer.keras_format.kernel_layout import row_groups
from quantizer.keras_format.layers import kernel_layout, solve_embedding
from quantizer.keras_format.variables import encode_kernel
from quantizer.problem import LayerProblem
from quantizer.result import GroupedWeight, SolveResult
from quantizer.schemes import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    Scheme,
)
from quantizer.solver import check_layer, solve_problems, solve_rows, uncalibrated

_Solved = TypeVar("_Solved")
_COMPILING_THREADS = 4
"""On a GPU's host."""


def solve_layers(
    targets: Mapping[str, Target],
    layers: Sequence[LayerPlan],
    values: Values,
    statistics: CalibrationStatistics | None,
    fold: Fold | None = None,
    drift: JudgedDrift | None = None,
    *,
    devices: Sequence[jax.Device] = (),
) -> list[SolvedLayer]:
    """Quantize layers that share an input, or that need no calibration.

    Statistics that no solver can use, since the model's own numbers overflowed or are all zero,
    cost these layers their calibration: they are rounded to nearest, and their reports say why.

    Args:
        layers: those to solve; all have a scheme.
        fold: what takes up the input scales that all of them share by a foldable awq; without it
            such layers get none.
        drift: of the input that they share, if any of them corrects it.

    Raises:
        QuantizationError: with the layer's path.
    """
    if isinstance(statistics, HessianSum):
        make_room(statistics.gram_CC.nbytes)
    by_scheme: dict[Scheme, list[LayerPlan]] = {}
    solved: dict[str, SolvedLayer] = {}
    for layer in layers:
        assert layer.scheme is not None
        target = targets[layer.path]
        if layer.kind == "embedding":
            solved[layer.path] = _solve_embedding(target, values, layer.scheme)
        elif layer.experts and isinstance(layer.scheme, Int8Scheme | Int4Scheme):
            solved[layer.path] = round_bank(target, layer.scheme, values)
        else:
            by_scheme.setdefault(layer.scheme, []).append(layer)
    for scheme, alike in by_scheme.items():
        problems = [_problem(targets[layer.path], scheme, values) for layer in alike]
        scales = _scale_of_input(scheme, fold, problems[0])
        attempt = partial(_solve_alike, problems, scales, devices)
        results, obstacle = _calibrated(attempt, statistics, drift, problems[0])
        for layer, result in zip(alike, results, strict=True):
            solved[layer.path] = _encoded(targets[layer.path], result, scheme, values, obstacle)
    return [solved[layer.path] for layer in layers]


def _solve_alike(
    problems: Sequence[LayerProblem],
    scale_of_input_C: NDArray[np.intp] | None,
    devices: Sequence[jax.Device],
    statistics: CalibrationStatistics | None,
    drift: Drift | None,
) -> list[SolveResult]:
    return solve_problems(
        problems, statistics, drift=drift, scale_of_input_C=scale_of_input_C, devices=devices
    )


def solve_slices(
    target: Target,
    layer: LayerPlan,
    values: Values,
    statistics: InputStatistics | None,
    slices: Sequence[int],
    drift: JudgedDrift | None = None,
    *,
    devices: Sequence[jax.Device] = (),
) -> SolvedSlices:
    """Quantize some row slices of a layer that may be cut (see `LayerPlan.slices`)."""
    if isinstance(statistics, ExpertHessians):
        return solve_ranges(target, layer, values, statistics, slices, devices=devices)
    if isinstance(statistics, HessianSum):
        make_room(statistics.gram_CC.nbytes)
    problem = _problem(target, _gptq(layer), values)

    def attempt(usable: CalibrationStatistics | None, drift: Drift | None) -> list[SolvedRows]:
        return solve_rows(problem, usable, slices, drift=drift, devices=devices)

    rows, obstacle = _calibrated(attempt, statistics, drift, problem)
    return SolvedSlices(
        path=layer.path, rows=dict(zip(slices, rows, strict=True)), problem=obstacle
    )


def join_layer(
    target: Target, layer: LayerPlan, values: Values, parts: Sequence[SolvedSlices]
) -> SolvedLayer:
    """What `solve_layers` gives for a layer, bit for bit, from all its slices."""
    if any(part.experts for part in parts):
        return join_bank(target, layer, values, parts)
    scheme = _gptq(layer)
    weight = target.axes.to_matrix(values[target.kernel_path])
    rows = {number: solved for part in parts for number, solved in part.rows.items()}
    in_order = [rows[number] for number in range(layer.slices)]
    result = join_slices(weight.astype(np.float32, copy=False), in_order, scheme)
    return _encoded(target, result, scheme, values, parts[0].problem)


def _problem(target: Target, scheme: Scheme, values: Values) -> LayerProblem:
    if target.num_experts:
        return bank_problem(target, scheme, values)
    kernel = values[target.kernel_path]
    layout = kernel_layout(target.layer)
    return check_layer(
        layout.to_matrix(kernel),
        scheme,
        scale_dtype=str(kernel.dtype),
        row_groups=row_groups(layout, scheme, target.path),
        name=target.path,
    )


def _scale_of_input(
    scheme: Scheme, fold: Fold | None, first: LayerProblem
) -> NDArray[np.intp] | None:
    """Which inputs share a scale by a foldable awq: all of them where nothing takes scales up."""
    if not isinstance(scheme, AWQScheme) or not scheme.foldable:
        return None
    in_features = first.weight_RC.shape[1]
    return np.zeros(in_features, np.intp) if fold is None else fold.scale_of_input(in_features)


def _calibrated(
    attempt: Callable[[CalibrationStatistics | None, Drift | None], _Solved],
    statistics: CalibrationStatistics | None,
    drift: Drift | None,
    first: LayerProblem,
) -> tuple[_Solved, str]:
    """What `attempt` gives with the statistics, and "".

    If they are unusable, what it gives without any knowledge of the inputs, and what was wrong.
    """
    try:
        return attempt(statistics, drift), ""
    except UnusableStatisticsError as error:
        if isinstance(first.scheme, Float8Scheme):
            raise  # without the largest input there is no scale for the inputs
        obstacle = str(error)
    ones_C = np.ones(first.weight_RC.shape[1], np.float32)
    if isinstance(statistics, HessianSum):
        # Uncorrelated inputs: no error can be corrected at another input.
        none = DriftSum(np.zeros((len(ones_C), len(ones_C)), np.float32), 1)
        return attempt(HessianSum(np.diag(ones_C), 1), none), obstacle
    return attempt(MagnitudeSum(ones_C, ones_C, ones_C, 1), None), obstacle


def _encoded(
    target: Target, result: SolveResult, scheme: Scheme, values: Values, obstacle: str
) -> SolvedLayer:
    """A kernel's result as Keras stores it.

    Args:
        obstacle: why the layer could not be calibrated; "" if it was.
    """
    report = result.report
    if obstacle:
        report = uncalibrated(report, obstacle, target.axes.out_features)
    if target.num_experts:
        assert isinstance(result.weight, GroupedWeight)
        return encoded_bank(target, result.weight, scheme, values, report.to_dict())
    layout = kernel_layout(target.layer)
    variables = encode_kernel(result.weight, layout, scheme)
    return SolvedLayer(path=target.path, variables=variables, report=report.to_dict())


def _solve_embedding(target: Target, values: Values, scheme: Scheme) -> SolvedLayer:
    table, reverse = values[target.table_path], target.reverse_table_path
    variables, report = solve_embedding(
        table,
        None if reverse is None else values[reverse],
        scheme,
        scale_dtype=str(table.dtype),
        name=target.path,
    )
    return SolvedLayer(path=target.path, variables=variables, report=report.to_dict())


def _gptq(layer: LayerPlan) -> GPTQScheme:
    assert isinstance(layer.scheme, GPTQScheme)
    return layer.scheme


class CompiledAhead:
    """GPTQ's programs for the blocks of a plan, compiled in the order of their first use."""

    def __init__(
        self, plan: Plan, targets: Callable[[int], Mapping[str, Target]], scale_dtype: str
    ) -> None:
        """Compiles nothing yet.

        Args:
            targets: the layers of a part, by path.
            scale_dtype: dtype in which most scales will be stored; programs for others are
                compiled when needed.
        """
        self._plan, self._targets, self._scale_dtype = plan, targets, scale_dtype
        self._compiling: dict[tuple[Scheme | None, int, int, int], Future[None]] = {}

    def begin(self) -> None:
        """Start compiling, once blocks are to be solved; evaluation needs none of it."""
        if self._compiling:
            return
        pool = ThreadPoolExecutor(_compiling_threads(), thread_name_prefix="compiling")
        for part in self._plan.parts[1:]:
            layers = {layer.name: layer for layer in part.layers}
            for group in part.groups:
                for name in group.targets:
                    self._compile(part.part, layers[name], bool(group.experts), pool)
        pool.shutdown(wait=False)

    def _compile(
        self, part: int, layer: LayerPlan, own_inputs: bool, pool: ThreadPoolExecutor
    ) -> None:
        program = _program(layer)
        if not isinstance(layer.scheme, GPTQScheme) or program in self._compiling:
            return
        target = self._targets(part)[layer.path]
        # Otherwise the slices, and so the programs, depend on the kernel's layout.
        if target.num_experts or kernel_layout(target.layer).keras_rows_are_inputs:
            self._compiling[program] = pool.submit(
                compile_solver,
                layer.out_features if own_inputs else target.axes.out_features,
                layer.in_features,
                layer.scheme,
                scale_dtype=self._scale_dtype,
            )

    def await_for(self, layers: Sequence[LayerPlan]) -> None:
        """Wait for the programs of these layers; compiling them a second time would cost more."""
        for layer in layers:
            compiling = self._compiling.get(_program(layer))
            if compiling is not None:
                compiling.result()


def _compiling_threads() -> int:
    """A CPU compiles beside its own work; on a GPU compiling takes longest, of one core each."""
    return 1 if jax.default_backend() == "cpu" else _COMPILING_THREADS


def _program(layer: LayerPlan) -> tuple[Scheme | None, int, int, int]:
    """What makes a program of its own."""
    return layer.scheme, layer.out_features, layer.in_features, layer.experts
