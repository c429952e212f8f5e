"""Codes as compressed-tensors and GPTQ store them: packed along the inputs or the outputs.

Sources: compressed-tensors 0.19, compressors/pack_quantized/helpers.py; GPTQModel 7.6,
PackableQuantLinear.
"""

from __future__ import annotations

import numpy as np

from pipeline.artifact.bit_packing import WORD_BITS, Codes, Words, pack_bits
from pipeline.errors import ExportError


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
        if size * bits % WORD_BITS:
            raise ExportError(
                f"{name}: {size} {axis} of {bits} bits do not fill whole 32-bit words, as the gptq "
                "format requires; use --format compressed-tensors or dense"
            )
    zero_GR = (zero_RG.T - np.uint8(zero_minus_one)) & np.uint8(2**bits - 1)
    qweight = np.ascontiguousarray(pack_bits(codes_RC, bits).T)
    return qweight, pack_bits(np.ascontiguousarray(zero_GR), bits)
