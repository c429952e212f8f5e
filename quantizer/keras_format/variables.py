"""From a kernel to the variables that stock Keras stores for it, mode by mode.

Names and shapes are those of the layers' `variable_serialization_spec`; what a mode does not
have (a zero point of int8, a bias) is not in the dict.

From the variables that stock Keras stores back to the kernel that they stand for.

The inverse: what a committed file holds is what later layers must be calibrated on, so it is read
back from the file's own arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.awq import solve_awq
from quantizer.errors import CalibrationError, LayerError
from quantizer.gptq.drift import DriftSum
from quantizer.gptq.solve import (
    SolvedRows,
    factorize_hessian,
    join_slices,
    row_slices,
    solve_slices,
)
from quantizer.hessian import HessianSum, MagnitudeSum
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.packing import pack_nibbles, unpack_nibbles
from quantizer.keras_format.row_groups import solve_in_keras_groups
from quantizer.result import (
    ChannelWeight,
    Float8Weight,
    Float32,
    GroupedWeight,
    Solution,
    SolveReport,
    output_error,
    weight_error,
)
from quantizer.rtn import AMAX_HISTORY_LENGTH
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import (
    CalibrationStatistics,
    check_scale_dtype,
    check_scheme,
    check_weight,
    require_hessian,
    solve,
    solve_stack,
)

Variables = dict[str, NDArray[Any]]


def solve_kernel(
    kernel: Float32,
    layout: KernelLayout,
    scheme: Scheme,
    statistics: CalibrationStatistics | None,
    *,
    drift: DriftSum | None = None,
    scale_dtype: str = "float32",
    name: str = "kernel",
) -> tuple[Variables, SolveReport]:
    """Quantize a Dense or EinsumDense kernel into the variables that stock Keras stores.

    Args:
        kernel: float32, shaped as Keras builds it.
        layout: of that kernel, from `quantizer.keras_format.kernel_layout`.
        statistics: of the layer's inputs, flattened by `layout.flatten_inputs`.
        scale_dtype: the layer's variable dtype.
        name: the layer, for messages.

    Raises:
        LayerError: a kernel that stock Keras cannot store in this mode.
        QuantizationError: as `quantizer.solve`.
    """
    if isinstance(scheme, GPTQScheme | AWQScheme) and (
        layout.batched or len(layout.shape) not in (2, 3)
    ):
        raise LayerError(
            f"{name}: stock Keras stores {scheme.mode} kernels as one matrix, which a kernel of "
            f"shape {layout.shape} with this equation is not; exclude the layer, or use int8"
        )
    weight_RC = check_weight(layout.to_matrix(kernel), name)
    check_scheme(scheme, layout.in_features, name)
    check_scale_dtype(scale_dtype, weight_RC, scheme, name)
    options: dict[str, Any] = {"scale_dtype": scale_dtype, "name": name}
    match scheme:
        case GPTQScheme():
            return _gptq(kernel, layout, scheme, statistics, drift, options)
        case AWQScheme():
            return _awq(kernel, layout, scheme, statistics, options)
        case Int8Scheme():
            solution = solve(layout.to_matrix(kernel), statistics, scheme, **options)
            assert isinstance(solution.weight, ChannelWeight)
            variables = {
                "kernel": np.ascontiguousarray(layout.from_matrix(solution.weight.codes_RC)),
                "kernel_scale": layout.to_output(solution.weight.scale_R),
            }
            return variables, solution.report
        case Int4Scheme():
            return _int4(kernel, layout, scheme, statistics, options)
        case Float8Scheme():
            solution = solve(layout.to_matrix(kernel), statistics, scheme, **options)
            assert isinstance(solution.weight, Float8Weight)
            return _float8(solution.weight, layout), solution.report


def solve_kernels(
    kernels: Sequence[Float32],
    layouts: Sequence[KernelLayout],
    scheme: Scheme,
    statistics: CalibrationStatistics | None,
    *,
    scale_dtype: Sequence[str],
    names: Sequence[str],
) -> list[tuple[Variables, SolveReport]]:
    """`solve_kernel` for several kernels of one input, with the same results, bit for bit.

    Those of gptq share one factorization where Keras keeps them as matrices.
    """
    found: dict[int, tuple[Variables, SolveReport]] = {}
    stacked: dict[str, list[int]] = {}
    for index, layout in enumerate(layouts):
        if isinstance(scheme, GPTQScheme) and layout.keras_rows_are_inputs:
            stacked.setdefault(scale_dtype[index], []).append(index)
        else:
            found[index] = solve_kernel(
                kernels[index],
                layout,
                scheme,
                statistics,
                scale_dtype=scale_dtype[index],
                name=names[index],
            )
    for dtype, members in stacked.items():
        assert isinstance(scheme, GPTQScheme)
        solutions = solve_stack(
            [layouts[index].to_matrix(kernels[index]) for index in members],
            require_hessian(
                statistics, layouts[members[0]].in_features, scheme.mode, names[members[0]]
            ),
            scheme,
            scale_dtype=dtype,
            names=[names[index] for index in members],
        )
        for index, solution in zip(members, solutions, strict=True):
            found[index] = _stored_gptq(solution, scheme), solution.report
    return [found[index] for index in range(len(kernels))]


def solve_kernel_rows(
    kernel: Float32,
    layout: KernelLayout,
    scheme: GPTQScheme,
    statistics: CalibrationStatistics | None,
    slices: Sequence[int],
    *,
    scale_dtype: str,
    name: str,
) -> list[SolvedRows]:
    """Some row slices of a kernel, by their number in `row_slices`; see `join_kernel_rows`.

    Raises:
        QuantizationError: as `quantizer.solve`.
    """
    weight_RC = check_weight(layout.to_matrix(kernel), name)
    check_scheme(scheme, layout.in_features, name)
    check_scale_dtype(scale_dtype, weight_RC, scheme, name)
    hessian = require_hessian(statistics, layout.in_features, scheme.mode, name)
    all_slices = row_slices(layout.out_features, layout.in_features)
    chosen = [weight_RC[slice(*all_slices[number])] for number in slices]
    factor = factorize_hessian(hessian, scheme)
    return solve_slices(chosen, factor, hessian, scheme, scale_dtype=scale_dtype)


def join_kernel_rows(
    kernel: Float32, layout: KernelLayout, scheme: GPTQScheme, rows: Sequence[SolvedRows]
) -> tuple[Variables, SolveReport]:
    """What `solve_kernel` gives, bit for bit, from all row slices of a kernel, in order."""
    solution = join_slices(layout.to_matrix(kernel), rows, scheme)
    return _stored_gptq(solution, scheme), solution.report


def _grouped(codes: NDArray[Any], scale: Float32, zero: NDArray[Any], bits: int) -> Variables:
    """gptq and awq: codes [columns, rows], two to a byte along the columns at 4 bits."""
    return {
        "quantized_kernel": pack_nibbles(codes, axis=0) if bits == 4 else codes,
        "kernel_scale": scale,
        "kernel_zero": zero,
    }


def _gptq(
    kernel: Float32,
    layout: KernelLayout,
    scheme: GPTQScheme,
    statistics: CalibrationStatistics | None,
    drift: DriftSum | None,
    options: dict[str, Any],
) -> tuple[Variables, SolveReport]:
    weight_RC = layout.to_matrix(kernel)
    if layout.keras_rows_are_inputs:
        solution = solve(weight_RC, statistics, scheme, drift=drift, **options)
    else:
        weight, report = solve_in_keras_groups(
            weight_RC, layout, scheme, statistics, drift=drift, **options
        )
        solution = Solution(weight, report)
    return _stored_gptq(solution, scheme), solution.report


def _stored_gptq(solution: Solution, scheme: GPTQScheme) -> Variables:
    weight = solution.weight
    assert isinstance(weight, GroupedWeight)
    codes = np.ascontiguousarray(weight.codes_RC)
    variables = _grouped(codes, weight.scale_RG, weight.zero_RG, scheme.weight_bits)
    return {**variables, "g_idx": weight.group_C.astype(np.float32)}


def _awq(
    kernel: Float32,
    layout: KernelLayout,
    scheme: AWQScheme,
    statistics: CalibrationStatistics | None,
    options: dict[str, Any],
) -> tuple[Variables, SolveReport]:
    weight_RC = layout.to_matrix(kernel)
    if layout.keras_rows_are_inputs:
        solution = solve(weight_RC, statistics, scheme, **options)
    else:
        # Keras repeats the inputs along its rows (Gemma: once a head), and each row has an
        # input scale of its own. As one big layer, its Hessian is the heads' on a diagonal;
        # their magnitudes say all that Keras' own criterion uses.
        spread = _spread(statistics, layout, options["name"])
        keras_weight = np.ascontiguousarray(layout.to_keras(weight_RC))
        solution = solve_awq(keras_weight, spread, scheme, scale_dtype=options["scale_dtype"])
    weight = solution.weight
    assert isinstance(weight, GroupedWeight)
    assert weight.input_scale_C is not None
    variables = {
        **_grouped(weight.codes_RC, weight.scale_RG, weight.zero_RG, scheme.weight_bits),
        "awq_scales": weight.input_scale_C,
        "g_idx": weight.group_C.astype(np.float32),
    }
    return variables, solution.report


def _spread(
    statistics: CalibrationStatistics | None, layout: KernelLayout, name: str
) -> MagnitudeSum:
    """Input magnitudes by row of Keras' layout."""
    if not set(layout.in_axes) <= set(range(2)):
        raise LayerError(
            f"{name}: stock Keras stores awq with one input scale a row, and the rows of a kernel "
            f"{layout.shape} with this equation mix inputs; exclude the layer, or use gptq"
        )
    if not isinstance(statistics, CalibrationStatistics):
        raise CalibrationError(
            f"{name}: awq needs calibration; give a HessianSum or a MagnitudeSum of the layer's "
            "inputs, or a scheme that needs none, such as int8"
        )
    statistics.check(layout.in_features, name)
    if isinstance(statistics, HessianSum):
        square_C = statistics.gram_CC.diagonal()
        root_C = np.sqrt(square_C / np.float32(statistics.num_rows))
        magnitudes = MagnitudeSum(
            root_C * np.float32(statistics.num_rows),
            square_C,
            np.sqrt(square_C),
            statistics.num_rows,
        )
    else:
        magnitudes = statistics
    inputs_RC = np.broadcast_to(
        np.arange(layout.in_features), (layout.out_features, layout.in_features)
    )
    input_of_row = layout.to_keras(inputs_RC)[0]
    return MagnitudeSum(
        magnitudes.sum_abs_C[input_of_row],
        magnitudes.sum_square_C[input_of_row],
        magnitudes.max_abs_C[input_of_row],
        magnitudes.num_rows,
    )


def _int4(
    kernel: Float32,
    layout: KernelLayout,
    scheme: Int4Scheme,
    statistics: CalibrationStatistics | None,
    options: dict[str, Any],
) -> tuple[Variables, SolveReport]:
    # Keras folds the kernel to [inputs, outputs] without moving axes first: for a kernel whose
    # inputs are not its leading axes the rows are a mixture, and only errors on the unfolded
    # kernel mean anything.
    flat_CR = kernel.reshape(layout.in_features, layout.out_features)
    solution = solve(np.ascontiguousarray(flat_CR.T), None, scheme, **options)
    weight = solution.weight
    matrix_RC = layout.to_matrix(kernel)
    restored_RC = layout.to_matrix(weight.dequantize().T.reshape(layout.shape))
    report = dataclasses.replace(solution.report, weight_error=weight_error(matrix_RC, restored_RC))
    if statistics is not None:
        statistics.check(layout.in_features, options["name"])
        loss = output_error(matrix_RC, restored_RC, statistics)
        report = dataclasses.replace(
            report, output_error=loss, rtn_output_error=loss, num_rows=statistics.num_rows
        )
    if isinstance(weight, ChannelWeight):
        codes_CR = weight.codes_RC.T
        return {
            "kernel": pack_nibbles(codes_CR, axis=-1),
            "kernel_scale": weight.scale_R,
        }, report
    assert isinstance(weight, GroupedWeight)
    return {
        "kernel": pack_nibbles(weight.codes_RC.T, axis=-1),
        "kernel_scale": np.ascontiguousarray(weight.scale_RG.T),
        "kernel_zero": np.ascontiguousarray(weight.zero_RG.T),
        "g_idx": weight.group_C.astype(np.float32),
    }, report


def _float8(weight: Float8Weight, layout: KernelLayout) -> Variables:
    def history(amax: np.float32) -> Float32:
        # Newest first: should the model be trained on, Keras goes on from what was calibrated.
        amax_H = np.zeros(AMAX_HISTORY_LENGTH, np.float32)
        amax_H[0] = amax
        return amax_H

    return {
        "kernel": np.ascontiguousarray(layout.from_matrix(weight.value_RC)),
        "inputs_scale": np.asarray(weight.input_scale),
        "inputs_amax_history": history(weight.input_amax),
        "kernel_scale": np.asarray(weight.weight_scale),
        "kernel_amax_history": history(weight.weight_amax),
        # Inference has no gradients; these are Keras' own initial values.
        "outputs_grad_scale": np.ones((), np.float32),
        "outputs_grad_amax_history": history(np.float32(0)),
    }


def restore_kernel(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme
) -> Float32:
    """The float32 kernel, shaped as Keras builds it.

    Args:
        variables: by name, as `quantizer.keras_format.variables.solve_kernel` gives them.
        layout: of the kernel.
        scheme: what it was quantized with.
    """
    match scheme:
        case GPTQScheme() | AWQScheme():
            num_columns = layout.in_features * layout.out_features // layout.keras_rows
            codes: NDArray[Any] = variables["quantized_kernel"]
            if scheme.weight_bits == 4:
                codes = unpack_nibbles(codes, num_columns, axis=0)
            values = _decode(codes, variables, "kernel", axis=1)
            if isinstance(scheme, AWQScheme):
                values /= variables["awq_scales"].astype(np.float32)
            return np.ascontiguousarray(values.T).reshape(layout.shape)
        case Int8Scheme():
            scale_R = _by_channel(variables["kernel_scale"], layout)
            matrix_RC = layout.to_matrix(variables["kernel"]).astype(np.float32)
            return np.ascontiguousarray(layout.from_matrix(matrix_RC / scale_R[:, None]))
        case Int4Scheme():
            codes = unpack_nibbles(variables["kernel"], layout.out_features, axis=-1)
            if "g_idx" in variables:
                values = _decode(codes, variables, "kernel", axis=0)
            else:
                values = _float32(codes) / _float32(variables["kernel_scale"])
            return values.reshape(layout.shape)
        case Float8Scheme():
            kernel: Float32 = variables["kernel"].astype(np.float32)
            return kernel


def _decode(
    codes: NDArray[Any], variables: Mapping[str, NDArray[Any]], prefix: str, axis: int
) -> Float32:
    """(code - zero) · scale, groups along `axis`."""
    group = variables["g_idx"].astype(np.int64)
    zero = np.take(variables[f"{prefix}_zero"].astype(np.float32), group, axis)
    scale = np.take(variables[f"{prefix}_scale"].astype(np.float32), group, axis)
    values: Float32 = (codes.astype(np.float32) - zero) * scale
    return values


def _float32(array: NDArray[Any]) -> Float32:
    return array.astype(np.float32)


def _by_channel(scale: NDArray[Any], layout: KernelLayout) -> Float32:
    """The inverse of `KernelLayout.to_output`: one value per output channel."""
    # A channel's number, sent the same way, says where its scale went.
    place = layout.to_output(np.arange(layout.out_features))
    scale_R = np.empty(layout.out_features, np.float32)
    scale_R[place.ravel()] = scale.astype(np.float32).ravel()
    return scale_R
