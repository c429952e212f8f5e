"""Solve the layers of one part: those that share an input together, embeddings on their own.

Solver programs compiled in a thread of their own, beside what is done until they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.model.targets import Target
from pipeline.plan import LayerPlan, Plan
from pipeline.run.worker_api import SolvedLayer, SolvedSlices, Values
from pipeline.worker.memory import make_room
from quantizer import HessianSum, MagnitudeSum, kernel_layout
from quantizer.errors import CalibrationError
from quantizer.gptq.solve import compile_solver
from quantizer.keras_format.embeddings import solve_embeddings
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.variables import (
    join_kernel_rows,
    restore_kernel,
    solve_kernel_rows,
    solve_kernels,
)
from quantizer.result import Float32
from quantizer.schemes import Float8Scheme, GPTQScheme, Scheme


def solve_layers(
    targets: Mapping[str, Target],
    layers: Sequence[LayerPlan],
    values: Values,
    sums: HessianSum | MagnitudeSum | None,
) -> list[SolvedLayer]:
    """Quantize layers that share an input, or that need to know nothing of theirs.

    Args:
        targets: the part's layers by path.
        layers: those to solve; all have a scheme.
        values: the source's arrays.
        sums: of the shared input.

    A sum that no solver can use, since the model's own numbers overflowed or are all zero, costs
    its layers their calibration: they are rounded to nearest, and their reports say why.

    Raises:
        QuantizationError: with the layer's path.
    """
    _make_room(sums)
    kernels = [layer for layer in layers if layer.kind == "kernel"]
    solved = {}
    by_scheme: dict[str, list[LayerPlan]] = {}
    for layer in kernels:
        by_scheme.setdefault(repr(layer.scheme), []).append(layer)
    for alike in by_scheme.values():
        assert alike[0].scheme is not None
        scheme = alike[0].scheme
        layouts = [kernel_layout(targets[layer.path].layer) for layer in alike]
        usable, problem = _usable(sums, layouts[0].in_features, scheme, alike[0].path)
        found = solve_kernels(
            [_float32(values[targets[layer.path].kernel_path]) for layer in alike],
            layouts,
            scheme,
            usable,
            scale_dtype=[_dtype(targets[layer.path], values) for layer in alike],
            names=[layer.path for layer in alike],
        )
        for layer, layout, (variables, report) in zip(alike, layouts, found, strict=True):
            solved[layer.path] = SolvedLayer(
                path=layer.path,
                variables=variables,
                report=report.to_dict() | (_rounded(layout, problem) if problem else {}),
                kernel=restore_kernel(variables, layout, scheme),
            )
    for layer in layers:
        if layer.kind == "embedding":
            solved[layer.path] = _solve_table(targets[layer.path], layer, values)
    return [solved[layer.path] for layer in layers]


def solve_some(
    target: Target,
    layer: LayerPlan,
    values: Values,
    sums: HessianSum | MagnitudeSum | None,
    slices: Sequence[int],
) -> SolvedSlices:
    """Quantize some row slices of a layer that may be cut (see `LayerPlan.slices`)."""
    _make_room(sums)
    scheme = _gptq(layer)
    layout = kernel_layout(target.layer)
    usable, problem = _usable(sums, layout.in_features, scheme, layer.path)
    rows = solve_kernel_rows(
        _float32(values[target.kernel_path]),
        layout,
        scheme,
        usable,
        slices,
        scale_dtype=_dtype(target, values),
        name=layer.path,
    )
    return SolvedSlices(path=layer.path, rows=dict(zip(slices, rows, strict=True)), problem=problem)


def join_layer(
    target: Target, layer: LayerPlan, values: Values, parts: Sequence[SolvedSlices]
) -> SolvedLayer:
    """What `solve_layers` gives for a layer, bit for bit, from all its slices."""
    scheme = _gptq(layer)
    layout = kernel_layout(target.layer)
    rows = {number: found for part in parts for number, found in part.rows.items()}
    variables, report = join_kernel_rows(
        _float32(values[target.kernel_path]),
        layout,
        scheme,
        [rows[number] for number in range(layer.slices)],
    )
    problem = parts[0].problem
    return SolvedLayer(
        path=layer.path,
        variables=variables,
        report=report.to_dict() | (_rounded(layout, problem) if problem else {}),
        kernel=restore_kernel(variables, layout, scheme),
    )


def _make_room(sums: HessianSum | MagnitudeSum | None) -> None:
    if isinstance(sums, HessianSum):
        make_room(sums.gram_CC.nbytes)


def _gptq(layer: LayerPlan) -> GPTQScheme:
    assert isinstance(layer.scheme, GPTQScheme)
    return layer.scheme


def _usable(
    sums: HessianSum | MagnitudeSum | None, in_features: int, scheme: Scheme, path: str
) -> tuple[HessianSum | MagnitudeSum | None, str]:
    """The sums, or what stands for knowing nothing, and why."""
    if sums is None:
        return None, ""
    try:
        sums.check(in_features, path)
    except CalibrationError as error:
        if isinstance(scheme, Float8Scheme):
            raise  # without the largest input there is no scale for inputs
        ones_C = np.ones(in_features, np.float32)
        if isinstance(sums, HessianSum):
            # Inputs that have nothing to do with each other: no error can be made good elsewhere.
            return HessianSum(np.diag(ones_C), 1), str(error)
        return MagnitudeSum(ones_C, ones_C, ones_C, 1), str(error)
    return sums, ""


def _rounded(layout: KernelLayout, problem: str) -> dict[str, Any]:
    """What an report says of a layer that could not be calibrated."""
    return {
        "output_error": None,
        "rtn_output_error": None,
        "kept": "rtn",
        "rtn_rows": layout.out_features,
        "num_rows": 0,
        "reason": f"not calibrated, rounded to nearest: {problem}",
    }


def _solve_table(target: Target, layer: LayerPlan, values: Values) -> SolvedLayer:
    assert layer.scheme is not None
    table = values[target.table_path]
    variables, report = solve_embeddings(
        _float32(table),
        None if target.reverse_table_path is None else _float32(values[target.reverse_table_path]),
        layer.scheme,
        scale_dtype=str(table.dtype),
        name=layer.path,
    )
    return SolvedLayer(path=layer.path, variables=variables, report=report.to_dict(), kernel=None)


def _dtype(target: Target, values: Values) -> str:
    return str(values[target.kernel_path].dtype)


def _float32(array: NDArray[Any]) -> Float32:
    return np.asarray(array, dtype=np.float32)


_Kind = tuple[str, int, int]
"""What makes a program of its own: scheme, in words, and shape."""


class CompiledAhead:
    """GPTQ's programs for the blocks of a plan, in the order of their first use."""

    def __init__(
        self, plan: Plan, targets: Callable[[int], Mapping[str, Target]], scale_dtype: str
    ) -> None:
        """Nothing is compiled yet.

        Args:
            targets: the layers of a part, by path.
            scale_dtype: in which most scales will be stored; others are compiled when needed.
        """
        self._plan, self._targets, self._scale_dtype = plan, targets, scale_dtype
        self._begun: dict[_Kind, Future[None]] = {}

    def begin(self) -> None:
        """Where blocks are to be solved soon; evaluating a result needs none of it."""
        if self._begun:
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="compiling")
        for part, layer in _in_order(self._plan):
            kind = _kind(layer)
            scheme = layer.scheme
            if not isinstance(scheme, GPTQScheme) or kind in self._begun:
                continue
            # Kernels that Keras groups otherwise are solved in slices that hang on their layout.
            if kernel_layout(self._targets(part)[layer.path].layer).keras_rows_are_inputs:
                shape = layer.out_features, layer.in_features
                self._begun[kind] = pool.submit(
                    compile_solver, *shape, scheme, scale_dtype=self._scale_dtype
                )
        pool.shutdown(wait=False)

    def await_for(self, layers: Sequence[LayerPlan]) -> None:
        """Wait for what is to solve these; to compile it twice would cost more."""
        for layer in layers:
            begun = self._begun.get(_kind(layer))
            if begun is not None:
                begun.result()


def _in_order(plan: Plan) -> list[tuple[int, LayerPlan]]:
    """The blocks' calibrated layers as their groups take turns, each with its part."""
    found = []
    for part in plan.parts[1:]:
        layers = {layer.name: layer for layer in part.layers}
        found += [(part.part, layers[name]) for group in part.groups for name in group.targets]
    return found


def _kind(layer: LayerPlan) -> _Kind:
    return repr(layer.scheme), layer.out_features, layer.in_features
