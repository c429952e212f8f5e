"""From the variables that stock Keras stores back to the kernel that they stand for.

The inverse of `quantizer.stored`: what a committed file holds is what later layers must be
calibrated on, so it is read back from the file's own arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.kernels import KernelLayout
from quantizer.packing import unpack_nibbles
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from quantizer.solution import Float32


def restore_kernel(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme
) -> Float32:
    """The float32 kernel, shaped as Keras builds it.

    Args:
        variables: by name, as `quantizer.stored.solve_kernel` gives them.
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
