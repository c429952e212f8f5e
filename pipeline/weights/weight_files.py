"""What the formats of weights share: the stored variable, its check, and reads in ranges."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, SourceError
from pipeline.model.preset import PresetFiles

_FLOATS = ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SourceVariable:
    """Where and how a variable's value is stored."""

    path: str
    file: str
    """Name within the preset; "" for a constant of KerasHub's converter."""
    key: str
    """Name of the dataset or tensor in the file."""
    shape: tuple[int, ...]
    """Of the model's variable."""
    dtype: str
    """Of the stored value."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class WeightFiles(Protocol):
    """The weights of one preset in one format."""

    def prepare(self) -> None:
        """Find out what every reading needs, after which several threads may read."""

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        """Find variables and check their shapes and dtypes, without reading their values."""

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Read variables in the dtypes in which they are stored."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of the weights files within the preset."""


def check_stored(where: str, shape: tuple[int, ...], dtype: str, variable: Any) -> None:
    """Check that a stored value fits its Keras variable; one float dtype may stand for another.

    Raises:
        SourceError: it does not fit.
    """
    expected_shape, expected_dtype = tuple(variable.shape), str(variable.dtype)
    if shape != expected_shape:
        raise SourceError(
            f"{where}: shape {shape}, where config.json implies {expected_shape}; weights and "
            "config are not of the same model"
        )
    fits = dtype in _FLOATS if expected_dtype in _FLOATS else dtype == expected_dtype
    if not fits:
        raise SourceError(
            f"{where}: dtype {dtype}, where {expected_dtype} is expected; a source must be a float "
            "model" + (" that names the 2-byte type it uses" if dtype == "|V2" else "")
        )


# Bits of the exponent, all of which are set in NaN and infinity alone.
_EXPONENTS = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}


def num_not_finite(value: NDArray[Any]) -> int:
    """The number of NaNs and infinities in an array."""
    # In the order of memory, since many tensors come transposed, and in slabs, so that the masks
    # take little memory beside a large array.
    order = sorted(range(value.ndim), key=lambda axis: -value.strides[axis])
    rows = np.atleast_1d(value.transpose(order))
    step = max(1, _SLAB_VALUES * len(rows) // max(1, rows.size))
    return sum(_num_not_finite(rows[i : i + step]) for i in range(0, len(rows), step))


def _num_not_finite(value: NDArray[Any]) -> int:
    exponent = _EXPONENTS.get(str(value.dtype))
    if exponent is not None:
        # Many times as fast as the functions for these types.
        bits = np.ascontiguousarray(value).view(np.uint16)
        return int(np.count_nonzero((bits & exponent) == exponent))
    return value.size - int(np.count_nonzero(np.isfinite(value)))


_SLAB_VALUES = 1 << 20
_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 64


class RangedFile(io.RawIOBase):
    """A stored file for h5py: large reads go straight to storage, small ones to cached blocks."""

    def __init__(self, preset: PresetFiles, name: str) -> None:
        super().__init__()
        self._preset, self._name = preset, name
        self._size = preset.sizes[name]
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.failure: PipelineError | None = None
        """The storage error, since HDF5 reports only that a read failed."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        try:
            data = self._read(self._position, stop)
        except PipelineError as error:
            self.failure = error
            raise
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, start: int, stop: int) -> bytes:
        if stop - start >= _BLOCK_BYTES:
            return self._preset.read(self._name, start, stop)
        first = start // _BLOCK_BYTES
        blocks = range(first, -(-stop // _BLOCK_BYTES))
        data = b"".join(self._block(index) for index in blocks)
        return data[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            start = index * _BLOCK_BYTES
            stop = min(start + _BLOCK_BYTES, self._size)
            self._blocks[index] = self._preset.read(self._name, start, stop)
            if len(self._blocks) > _NUM_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]
