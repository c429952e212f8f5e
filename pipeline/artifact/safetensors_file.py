"""Write and read a safetensors file; equal tensors give equal bytes.

The safetensors package orders its metadata by a random hash, so its bytes differ between processes;
and it gives NumPy no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError, WeightsFileError

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
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100 << 20
_FORMAT = MappingProxyType({"format": "pt"})
"""transformers refuses files that do not say which framework's they are."""


def safetensors_bytes(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] = _FORMAT
) -> bytes:
    """The content of a safetensors file.

    Tensors of wide elements come first, so that each lies at a multiple of its element's size.

    Raises:
        ExportError: a dtype that such files do not have.
    """
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise ExportError(f"{name}: a safetensors file holds no {array.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
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


def read_safetensors(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a file, as views of its bytes, and its metadata.

    Raises:
        WeightsFileError: a file that is damaged, or has tensors of other dtypes.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        if not 8 < start <= min(len(data), _MAX_HEADER_BYTES):
            raise ValueError("truncated")
        header = json.loads(data[8:start])
        metadata = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
        return {name: _tensor(entry, data, start) for name, entry in header.items()}, metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsFileError(
            f"safetensors file of {len(data)} bytes is damaged ({error}); it has to be made again"
        ) from None


def _tensor(entry: Mapping[str, Any], data: bytes, start: int) -> NDArray[Any]:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    first, last = (start + int(offset) for offset in entry["data_offsets"])
    if not start <= first <= last <= len(data):
        raise ValueError(f"bytes {first} to {last} of {len(data)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"{last - first} bytes for {dtype}{list(shape)}")
    return np.frombuffer(data, dtype, math.prod(shape), first).reshape(shape)
