"""The file of codes of a part: what the float values of its banks of experts were decoded from.

No layer of stock Keras holds quantized experts, so that the artifact has them as floats. Their
codes lie beside it, in one safetensors file for each part that has such banks. For a variable at
`path`, [experts, in_features, out_features]:

    <path>.codes   int32, [experts, out_features, words]: packed along the inputs, as by pack_bits
    <path>.scales  [experts, out_features, groups], in the variable's dtype
    <path>.zeros   uint8, as scales; only of schemes that are not symmetric

value = (code - zero) · scale in float32, rounded to the variable's dtype; a symmetric scheme's zero
is the middle of the codes' range. The file's metadata has, at `path`, what is needed to unpack it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.bit_packing import WORD_BITS, pack_bits, unpack_bits
from pipeline.artifact.safetensors_file import read_safetensors, safetensors_bytes
from pipeline.errors import WeightsFileError
from quantizer.expert_codes import ExpertCodes
from quantizer.qparams import num_groups


def codes_file_bytes(banks: Mapping[str, ExpertCodes]) -> bytes:
    """The codes of banks, by the path of their variable; the same bytes for the same codes."""
    tensors: dict[str, NDArray[Any]] = {}
    metadata = {}
    for path, bank in banks.items():
        tensors[f"{path}.codes"] = pack_bits(bank.codes_ERC, bank.bits)
        tensors[f"{path}.scales"] = bank.scale_ERG
        if not bank.symmetric:
            tensors[f"{path}.zeros"] = bank.zero_ERG
        described = {
            "bits": bank.bits,
            "group_size": bank.group_size,
            "symmetric": bank.symmetric,
            "in_features": bank.in_features,
            "expert_axis": 0,
        }
        metadata[path] = json.dumps(described, sort_keys=True)
    return safetensors_bytes(tensors, metadata)


def read_codes_file(data: bytes) -> dict[str, ExpertCodes]:
    """The inverse of `codes_file_bytes`.

    Raises:
        WeightsFileError: a file that is damaged, or holds anything else.
    """
    tensors, metadata = read_safetensors(data)
    banks = {}
    for path, text in metadata.items():
        try:
            banks[path] = _bank(path, json.loads(text), tensors)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsFileError(f"codes of {path} are damaged ({error})") from None
    if tensors:
        raise WeightsFileError(f"codes file: nothing describes {sorted(tensors)[0]}")
    return banks


def _bank(path: str, described: Any, tensors: dict[str, NDArray[Any]]) -> ExpertCodes:
    """One bank, whose tensors are taken out of those of the file."""
    bits, group_size = described["bits"], described["group_size"]
    in_features, symmetric = described["in_features"], described["symmetric"]
    if not (0 < bits <= 8 and in_features > 0 and (group_size == -1 or group_size > 0)):
        raise ValueError(f"described as {described}")
    words, scale = tensors.pop(f"{path}.codes"), tensors.pop(f"{path}.scales")
    # First, since everything else is as large as these numbers say.
    num_words = -(-in_features * bits // WORD_BITS)
    if words.dtype != np.int32 or words.ndim != 3 or words.shape[2] != num_words:
        raise ValueError(f"words {words.dtype}{list(words.shape)} of {in_features} inputs")
    groups = (*words.shape[:2], num_groups(in_features, group_size))
    if symmetric:
        zero = np.full(groups, 2 ** (bits - 1), np.uint8)
    else:
        zero = tensors.pop(f"{path}.zeros")
    if scale.shape != groups or zero.shape != groups or zero.dtype != np.uint8:
        raise ValueError(f"{scale.shape} scales and {zero.shape} zeros of {groups} groups")
    return ExpertCodes(
        codes_ERC=unpack_bits(words, bits, in_features),
        scale_ERG=scale,
        zero_ERG=zero,
        bits=bits,
        group_size=group_size,
        symmetric=bool(symmetric),
    )
