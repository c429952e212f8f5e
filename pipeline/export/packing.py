"""Codes of a few bits packed into 32-bit words, as compressed-tensors and GPTQ store them.

Both are one dense stream of bits along an axis, lowest bit first: code i fills bits [i·b, (i+1)·b)
of its row, and crosses from one word to the next where b does not divide 32. They differ only in
the axis. Sources: compressed-tensors 0.19, compressors/pack_quantized/helpers.py; GPTQModel 7.6,
PackableQuantLinear.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]

_WORD_BITS = 32


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
    num_runs = -(-length // _WORD_BITS)
    padded = np.zeros((*lead, num_runs * _WORD_BITS), np.uint8)
    padded[..., :length] = codes
    runs = padded.reshape(*lead, num_runs, _WORD_BITS)
    words = np.zeros((*lead, num_runs, bits), np.uint32)
    for place in range(_WORD_BITS):
        word, offset = divmod(place * bits, _WORD_BITS)
        code = runs[..., place].astype(np.uint32)
        words[..., word] |= code << np.uint32(offset)
        if offset + bits > _WORD_BITS:
            words[..., word + 1] |= code >> np.uint32(_WORD_BITS - offset)
    num_words = -(-length * bits // _WORD_BITS)
    stream = words.reshape(*lead, num_runs * bits)[..., :num_words]
    return np.ascontiguousarray(stream).view(np.int32)


def unpack_bits(words: Words, bits: int, length: int) -> Codes:
    """The inverse of `pack_bits`; `length` is the last axis' unpacked length."""
    *lead, num_words = words.shape
    num_runs = -(-length // _WORD_BITS)
    padded = np.zeros((*lead, num_runs * bits), np.uint32)
    padded[..., :num_words] = words.view(np.uint32)
    runs = padded.reshape(*lead, num_runs, bits)
    codes = np.empty((*lead, num_runs, _WORD_BITS), np.uint8)
    mask = np.uint32(2**bits - 1)
    for place in range(_WORD_BITS):
        word, offset = divmod(place * bits, _WORD_BITS)
        code = runs[..., word] >> np.uint32(offset)
        if offset + bits > _WORD_BITS:
            code = code | (runs[..., word + 1] << np.uint32(_WORD_BITS - offset))
        codes[..., place] = code & mask
    return codes.reshape(*lead, num_runs * _WORD_BITS)[..., :length].copy()


def pack_quantized(codes_RC: Codes, zero_RG: Codes | None, bits: int) -> tuple[Words, Words | None]:
    """weight_packed and weight_zero_point of compressed-tensors' "pack-quantized".

    Args:
        zero_RG: None for a symmetric scheme, which stores none.

    Returns:
        Codes packed along the inputs, [R, ceil(C·bits/32)]; zero points packed along the outputs,
        [ceil(R·bits/32), G].
    """
    if zero_RG is None:
        return pack_bits(codes_RC, bits), None
    return pack_bits(codes_RC, bits), np.ascontiguousarray(pack_bits(zero_RG.T, bits).T)


def pack_gptq(
    codes_RC: Codes, zero_RG: Codes, bits: int, *, zero_minus_one: bool, name: str
) -> tuple[Words, Words]:
    """qweight and qzeros of a GPTQ checkpoint.

    Args:
        zero_minus_one: the old format "gptq" stores each zero point less 1; "gptq_v2" as it is.
        name: of the layer, for errors.

    Returns:
        Codes packed along the inputs, [C·bits/32, R]; zero points packed along the outputs,
        [G, R·bits/32].

    Raises:
        ExportError: in_features or out_features do not fill whole words.
    """
    for axis, size in (("inputs", codes_RC.shape[1]), ("outputs", codes_RC.shape[0])):
        if size * bits % _WORD_BITS:
            raise ExportError(
                f"{name}: {size} {axis} of {bits} bits do not fill whole 32-bit words, as the gptq "
                "format requires; use --format compressed-tensors or dense"
            )
    zero_GR = (zero_RG.T - np.uint8(zero_minus_one)) & np.uint8(2**bits - 1)
    qweight = np.ascontiguousarray(pack_bits(codes_RC, bits).T)
    return qweight, pack_bits(np.ascontiguousarray(zero_GR), bits)
