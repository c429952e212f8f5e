"""Write a safetensors file; equal tensors give equal bytes.

The safetensors package orders its metadata by a random hash, so its bytes differ between processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError

_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
_ALIGNMENT = 8


def safetensors_bytes(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of a safetensors file.

    Tensors of wide elements come first, so that each lies at a multiple of its element's size.

    Raises:
        ExportError: a dtype that such files do not have.
    """
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise ExportError(f"{name}: a safetensors file holds no {array.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    # transformers refuses files that do not say which framework's they are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        array = tensors[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join(
        [len(text).to_bytes(8, "little"), text, *(_little_endian(tensors[name]) for name in order)]
    )


def _little_endian(array: NDArray[Any]) -> bytes:
    return array.tobytes() if array.dtype.byteorder != ">" else array.byteswap().tobytes()
