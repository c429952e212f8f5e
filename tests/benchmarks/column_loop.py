"""The paper's column loop (arXiv 2210.17323, Alg. 1) in plain NumPy: a yardstick for speed.

Cholesky factor of the inverse Hessian, lazy updates by blocks of 128 columns, float32, and a
min-max grid per group found when the loop reaches it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_BLOCK = 128


def min_max_grid(weight_RS: Float32, max_code: float) -> tuple[Float32, Float32]:
    """Scale and zero point of each row's range, widened to include zero; both [R, 1]."""
    low_R1 = np.minimum(weight_RS.min(1, keepdims=True), 0)
    high_R1 = np.maximum(weight_RS.max(1, keepdims=True), 0)
    scale_R1 = (high_R1 - low_R1) / np.float32(max_code)
    scale_R1[scale_R1 == 0] = 1
    return scale_R1, np.round(-low_R1 / scale_R1)


def quantize_columns(
    weight_RC: Float32, hessian_CC: Float32, *, bits: int, group_size: int, damping: float
) -> Float32:
    """Return the dequantized weights, [out_features, in_features].

    Args:
        weight_RC: [out_features, in_features].
        hessian_CC: undamped.
        group_size: a divisor of the block of 128 columns.
        damping: share of the Hessian's mean diagonal added to it.
    """
    if _BLOCK % group_size:
        raise ValueError(f"group_size must divide {_BLOCK}, got {group_size}")
    num_inputs = weight_RC.shape[1]
    max_code = 2.0**bits - 1
    damped_CC = hessian_CC + np.eye(num_inputs, dtype=np.float32) * np.float32(
        damping * np.diagonal(hessian_CC).mean()
    )
    factor_CC = np.linalg.cholesky(np.linalg.inv(damped_CC)).T
    weight_RC = weight_RC.copy()
    restored_RC = np.empty_like(weight_RC)
    for a in range(0, num_inputs, _BLOCK):
        b = min(a + _BLOCK, num_inputs)
        # Fortran order makes each column one run of memory.
        block_RB = np.asfortranarray(weight_RC[:, a:b])
        error_RB = np.empty_like(block_RB)
        for k in range(b - a):
            if (a + k) % group_size == 0:
                scale_R1, zero_R1 = min_max_grid(block_RB[:, k : k + group_size], max_code)
            code_R = np.clip(np.round(block_RB[:, k] / scale_R1[:, 0]) + zero_R1[:, 0], 0, max_code)
            restored_R = (code_R - zero_R1[:, 0]) * scale_R1[:, 0]
            row_B = factor_CC[a + k, a:b]
            error_RB[:, k] = (block_RB[:, k] - restored_R) / row_B[k]
            block_RB[:, k + 1 :] -= error_RB[:, k, None] * row_B[k + 1 :]
            restored_RC[:, a + k] = restored_R
        weight_RC[:, b:] -= error_RB @ factor_CC[a:b, b:]
    return restored_RC
