"""Codes of a few bits packed into 32-bit words along the last axis, lowest bit first.

One dense stream of bits: code i fills bits [i·b, (i+1)·b) of its row, and crosses from one word to
the next where b does not divide 32. compressed-tensors packs weights in the same way (0.19,
compressors/pack_quantized/helpers.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]

WORD_BITS = 32


def pack_bits(codes: Codes, bits: int) -> Words:
    """Pack unsigned codes along the last axis.

    Args:
        codes: [..., N], each below 2**bits.
        bits: of each code, 1 to 8.

    Returns:
        [..., ceil(N · bits / 32)]; the bits after the last code are 0.
    """
    *lead, length = codes.shape
    # 32 codes fill exactly `bits` words.
    num_runs = -(-length // WORD_BITS)
    padded = np.zeros((*lead, num_runs * WORD_BITS), np.uint8)
    padded[..., :length] = codes
    runs = padded.reshape(*lead, num_runs, WORD_BITS)
    words = np.zeros((*lead, num_runs, bits), np.uint32)
    for place in range(WORD_BITS):
        word, offset = divmod(place * bits, WORD_BITS)
        code = runs[..., place].astype(np.uint32)
        words[..., word] |= code << np.uint32(offset)
        if offset + bits > WORD_BITS:
            words[..., word + 1] |= code >> np.uint32(WORD_BITS - offset)
    num_words = -(-length * bits // WORD_BITS)
    stream = words.reshape(*lead, num_runs * bits)[..., :num_words]
    return np.ascontiguousarray(stream).view(np.int32)


def unpack_bits(words: Words, bits: int, length: int) -> Codes:
    """The inverse of `pack_bits`; `length` is the last axis' unpacked length."""
    *lead, num_words = words.shape
    num_runs = -(-length // WORD_BITS)
    padded = np.zeros((*lead, num_runs * bits), np.uint32)
    padded[..., :num_words] = words.view(np.uint32)
    runs = padded.reshape(*lead, num_runs, bits)
    codes = np.empty((*lead, num_runs, WORD_BITS), np.uint8)
    mask = np.uint32(2**bits - 1)
    for place in range(WORD_BITS):
        word, offset = divmod(place * bits, WORD_BITS)
        code = runs[..., word] >> np.uint32(offset)
        if offset + bits > WORD_BITS:
            code = code | (runs[..., word + 1] << np.uint32(WORD_BITS - offset))
        codes[..., place] = code & mask
    return codes.reshape(*lead, num_runs * WORD_BITS)[..., :length].copy()
