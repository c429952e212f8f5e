"""Two 4-bit codes in a byte, as stock Keras packs and reads them.

The first of two neighbours along the axis goes to the low nibble; an odd length is padded
with a zero code. Signed codes (int4) and unsigned ones (gptq, awq) share the layout.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Byte = TypeVar("_Byte", np.int8, np.uint8)


def pack_nibbles(codes: NDArray[_Byte], axis: int) -> NDArray[_Byte]:
    """Pack int8 codes in [-8, 7] or uint8 codes in [0, 15]; the axis halves, rounded up."""
    front = np.moveaxis(codes, axis, 0)
    if front.shape[0] % 2:
        front = np.concatenate([front, np.zeros_like(front[:1])])
    nibbles = np.ascontiguousarray(front).view(np.uint8) & 0x0F
    packed = nibbles[::2] | (nibbles[1::2] << 4)
    return np.ascontiguousarray(np.moveaxis(packed.view(codes.dtype), 0, axis))


def unpack_nibbles(packed: NDArray[_Byte], length: int, axis: int) -> NDArray[_Byte]:
    """The inverse of `pack_nibbles`; `length` is the axis' unpacked length."""
    front = np.ascontiguousarray(np.moveaxis(packed, axis, 0)).view(np.uint8)
    nibbles = np.stack([front & 0x0F, front >> 4], axis=1).reshape(-1, *front.shape[1:])[:length]
    if packed.dtype == np.int8:
        signed = (nibbles ^ 8).astype(np.int8) - np.int8(8)
        return np.ascontiguousarray(np.moveaxis(signed, 0, axis))
    return np.ascontiguousarray(np.moveaxis(nibbles, 0, axis)).astype(packed.dtype, copy=False)
