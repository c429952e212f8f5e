"""Keras' quantized kernels as other runtimes want them: codes, scales and zero points of a matrix.

Each code of a kernel knows which scale it is under. Both are moved to where the checkpoint has that
weight; a group that is not a run of inputs there cannot be stored, and is refused. So the layouts
of Keras and of the checkpoint need not be compared case by case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, code_format
from pipeline.model.tensor_places import TensorPlace, TensorPlaces
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.variables import by_channel, unpack_nibbles
from quantizer.schemes import AWQScheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

Float32 = NDArray[np.float32]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class KernelCodes:
    """A kernel's codes: value = (code - zero) · scale of the code's group.

    Attributes:
        format: with the scheme's own group size.
        codes: unsigned, or E4M3; in the kernel's own shape.
        group: of each code; same shape.
        scale, zero: by group.
        input_scale: of float8 inputs.
    """

    format: CodeFormat
    codes: NDArray[Any]
    group: NDArray[np.int32]
    scale: Float32
    zero: NDArray[np.uint8]
    input_scale: np.float32 | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear layer's weight, [out_features, in_features], as codes.

    Attributes:
        format: with the group size that the matrix really has.
        codes_RC: unsigned, or E4M3.
        scale_RG, zero_RG: by output channel and group.
    """

    format: CodeFormat
    codes_RC: NDArray[Any]
    scale_RG: Float32
    zero_RG: NDArray[np.uint8]
    input_scale: np.float32 | None = None


def kernel_codes(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme, name: str
) -> KernelCodes:
    """A quantized layer's kernel as codes.

    Args:
        variables: by name, as stock Keras stores them.
        name: of the layer, for errors.

    Raises:
        ExportError: a scheme without such codes, or values off the scheme's grid.
    """
    found = code_format(scheme)
    if found is None:
        raise awq_refused(name)
    match scheme:
        case GPTQScheme() | AWQScheme():
            return _gptq_codes(variables, layout, found, name)
        case Int8Scheme():
            codes = (variables["kernel"].astype(np.int16) + 128).astype(np.uint8)
            scale = by_channel(variables["kernel_scale"], layout)
            return _symmetric(found, codes, layout, np.float32(1) / scale)
        case Int4Scheme():
            return _int4_codes(variables, layout, found)
        case _:
            return _float8_codes(variables, layout, found, name)


def awq_refused(name: str) -> ExportError:
    """Input scales have no place among codes."""
    return ExportError(
        f"{name}: awq gives each layer's inputs scales of its own, which no runtime but Keras "
        "stores; quantize with foldable: true in its scheme, or export with --format dense"
    )


def _gptq_codes(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, found: CodeFormat, name: str
) -> KernelCodes:
    num_columns = layout.in_features * layout.out_features // layout.keras_rows
    codes: NDArray[Any] = variables["quantized_kernel"]
    if found.bits == 4:
        codes = unpack_nibbles(codes, num_columns, axis=0)
    zero, scale = variables["kernel_zero"], variables["kernel_scale"]
    if found.symmetric and not (zero == 2 ** (found.bits - 1)).all():
        raise ExportError(
            f"{name}: a zero point of a symmetric scheme is not {2 ** (found.bits - 1)}; the file "
            "is not of this recipe"
        )
    num_groups = scale.shape[1]
    group = variables["g_idx"].astype(np.int32)[None] + (
        np.arange(num_columns, dtype=np.int32)[:, None] * num_groups
    )
    return KernelCodes(
        format=found,
        codes=codes.T.reshape(layout.shape),
        group=group.T.reshape(layout.shape),
        scale=scale.astype(np.float32).reshape(-1),
        zero=zero.reshape(-1),
    )


def _int4_codes(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, found: CodeFormat
) -> KernelCodes:
    signed = unpack_nibbles(variables["kernel"], layout.out_features, axis=-1)
    codes = (signed + 8).astype(np.uint8).reshape(layout.shape)
    scale = variables["kernel_scale"].astype(np.float32)
    columns = np.arange(layout.out_features, dtype=np.int32)
    if "g_idx" not in variables:
        group = np.broadcast_to(columns, signed.shape).reshape(layout.shape)
        zero = np.full(scale.shape, 8, np.uint8)
        return KernelCodes(
            format=found, codes=codes, group=group, scale=np.float32(1) / scale, zero=zero
        )
    group = variables["g_idx"].astype(np.int32)[:, None] * np.int32(columns.size) + columns
    return KernelCodes(
        format=found,
        codes=codes,
        group=group.reshape(layout.shape),
        scale=scale.reshape(-1),
        zero=(variables["kernel_zero"].astype(np.int16) + 8).astype(np.uint8).reshape(-1),
    )


def _float8_codes(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, found: CodeFormat, name: str
) -> KernelCodes:
    kernel, scale = variables["kernel"], np.float32(variables["kernel_scale"])
    with np.errstate(over="ignore", invalid="ignore"):
        codes = (kernel.astype(np.float32) / scale).astype(FLOAT8)
        back = (codes.astype(np.float32) * scale).astype(kernel.dtype)
    # One rounding apart: Keras stores the product in the layer's own dtype.
    apart = np.abs(back.astype(np.float32) - kernel.astype(np.float32))
    if not (apart <= np.abs(kernel.astype(np.float32)) * 2.0**-7).all():
        raise ExportError(
            f"{name}: its kernel is not on the grid of its float8 scale; the file is not of this "
            "recipe"
        )
    scales = np.full(layout.out_features, scale, np.float32)
    made = _symmetric(found, codes, layout, scales)
    return replace(made, input_scale=np.float32(variables["inputs_scale"]))


def _symmetric(
    found: CodeFormat, codes: NDArray[Any], layout: KernelLayout, scale_R: Float32
) -> KernelCodes:
    """Codes under one scale per output channel."""
    shape = layout.out_features, layout.in_features
    channel = np.arange(layout.out_features, dtype=np.int32)[:, None]
    return KernelCodes(
        format=found,
        codes=codes,
        group=layout.from_matrix(np.broadcast_to(channel, shape)),
        scale=scale_R,
        zero=np.full(layout.out_features, 128, np.uint8),
    )


def join_matrix(
    place: TensorPlace, places: TensorPlaces, kernels: Mapping[str, KernelCodes]
) -> Matrix:
    """The matrix of a tensor, from the kernels that it holds.

    Args:
        kernels: by variable path, one for each of the place's variables.

    Raises:
        ExportError: the checkpoint fuses layers of different schemes, or groups are no runs of its
            inputs.
    """
    first = kernels[place.variables[0]]
    for path in place.variables:
        if kernels[path].format != first.format or kernels[path].input_scale != first.input_scale:
            raise ExportError(
                f"{place.name} holds {', '.join(map(_layer, place.variables))} in one matrix, "
                f"and their schemes differ ({first.format.described}; "
                f"{kernels[path].format.described}); give them one scheme, or use --format dense"
            )
    codes = np.empty(place.shape, first.codes.dtype)
    group = np.empty(place.shape, np.int32)
    num_groups = 0
    for path in place.variables:
        kernel = kernels[path]
        # By bytes: NumPy's indexing knows no float8.
        places.scatter(path, kernel.codes.view(np.uint8), codes.view(np.uint8))
        places.scatter(path, kernel.group + np.int32(num_groups), group)
        num_groups += kernel.scale.size
    if place.input_axis == 0:
        codes, group = codes.T, group.T
    group_size = _run_length(group, first.format.group_size, place)
    starts = group[:, :: group.shape[1] if group_size == -1 else group_size]
    scale = np.concatenate([kernels[path].scale for path in place.variables])
    zero = np.concatenate([kernels[path].zero for path in place.variables])
    return Matrix(
        format=replace(first.format, group_size=group_size),
        codes_RC=np.ascontiguousarray(codes),
        scale_RG=scale[starts],
        zero_RG=zero[starts],
        input_scale=first.input_scale,
    )


def _run_length(group_RC: NDArray[np.int32], group_size: int, place: TensorPlace) -> int:
    """The inputs that share a scale in every row; -1 if all of a row do."""
    num_rows, num_inputs = group_RC.shape
    if (group_RC == group_RC[:, :1]).all():
        return -1
    layers = ", ".join(map(_layer, place.variables))
    if group_size > 0 and num_inputs % group_size:
        raise ExportError(
            f"{layers}: {num_inputs} inputs are not divisible into groups of {group_size}, and "
            "other runtimes have no shorter last group; quantize with a group_size that divides "
            f"{num_inputs} (or -1), or use --format dense"
        )
    runs = group_RC.reshape(num_rows, -1, max(group_size, 1))
    if group_size == -1 or not (runs == runs[..., :1]).all():
        raise ExportError(
            f"{layers}: the weights that share a scale in Keras do not lie side by side in "
            f"{place.name}; quantize with gptq and a group_size that divides the inputs of one "
            "head, or use --format dense"
        )
    return group_size


def _layer(path: str) -> str:
    return path.rpartition("/")[0]
