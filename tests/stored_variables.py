"""What stock Keras might store for a layer, made up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.variables import pack_nibbles
from quantizer.schemes import AWQScheme, Float8Scheme, Int4Scheme, Int8Scheme, Scheme


def random_variables(
    layout: KernelLayout, scheme: Scheme, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """What stock Keras might store: any codes, groups in any order, scales of all sizes."""
    kernel = rng.integers(-127, 128, layout.shape).astype(np.int8)
    scale_R = np.exp(rng.normal(size=layout.out_features, scale=9)).astype(np.float32)
    match scheme:
        case Int8Scheme():
            return {"kernel": kernel, "kernel_scale": layout.to_output(scale_R)}
        case Float8Scheme():
            return {"kernel": kernel.astype(np.float32) / 3}
        case Int4Scheme(block_size=-1):
            codes = rng.integers(-8, 8, (layout.in_features, layout.out_features))
            return {"kernel": pack_nibbles(codes.astype(np.int8), -1), "kernel_scale": scale_R}
        case Int4Scheme():
            rows, columns, low, high, bits = layout.in_features, layout.out_features, -8, 8, 4
        case _:
            rows, bits = layout.keras_rows, scheme.weight_bits
            columns = layout.in_features * layout.out_features // rows
            low, high = 0, 2**bits
    stored = np.int8 if low else np.uint8
    num_groups = 3
    codes = rng.integers(low, high, (columns, rows)).astype(stored)
    scale = np.exp(rng.normal(size=(columns, num_groups), scale=9)).astype(np.float32)
    zero = rng.integers(low, high, (columns, num_groups)).astype(stored)
    group = {"g_idx": rng.integers(0, num_groups, rows).astype(np.float32)}
    if isinstance(scheme, Int4Scheme):
        return group | {
            "kernel": pack_nibbles(codes.T, -1),
            "kernel_scale": scale.T,
            "kernel_zero": zero.T,
        }
    if isinstance(scheme, AWQScheme):
        group["awq_scales"] = np.exp(rng.normal(size=rows, scale=3)).astype(np.float32)
    return group | {
        "quantized_kernel": pack_nibbles(codes, 0) if bits == 4 else codes,
        "kernel_scale": scale,
        "kernel_zero": zero,
    }
