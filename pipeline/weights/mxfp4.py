"""Decode MXFP4 quickly: what a converter computes number by number is looked up here byte by byte.

Open Compute Project, Microscaling Formats (MX) 1.0: a number has four bits, a sign, two of an
exponent and one of a mantissa; 32 of them share a power of two. GPT-OSS stores a matrix [outputs,
inputs] of each expert as blocks, [outputs, groups, 16] bytes with two numbers each, the lower four
bits first, and scales, [outputs, groups] exponents with a bias of 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.model.recorded_tensors import Stored

_BLOCK_BYTES = 16
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_SIZES, *(-size for size in _SIZES)], np.float32)
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=1)
"""The two numbers of each byte, [256, 2]."""


def are_mxfp4(tensors: Sequence[Stored]) -> bool:
    """Whether tensors look like blocks and scales."""
    if len(tensors) != 2 or any(tensor.dtype != np.uint8 for tensor in tensors):
        return False
    blocks, scales = (tensor.shape for tensor in tensors)
    return len(blocks) == 4 and blocks == (*scales, _BLOCK_BYTES)


def decoded(blocks: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """One expert's matrix, [1, inputs, outputs], from blocks [1, outputs, groups, 16].

    Numbers and powers of two are exact in float32, and so are their products, but where these are
    too small or too large for it.
    """
    values = _PAIRS[blocks[0]]
    values *= np.exp2(scales[0].astype(np.float32) - np.float32(127))[..., None, None]
    matrix: NDArray[np.float32] = values.reshape(len(values), -1).T[None]
    return matrix
