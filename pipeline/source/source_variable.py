"""One variable of a source: what the model expects of it, and what is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError

_FLOATS = ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SourceVariable:
    """Where a variable's value is, and as what.

    Attributes:
        path: the Keras variable's path.
        file: name of the file within the preset; "" for a constant of KerasHub's converter.
        key: name of the dataset or tensor in it.
        shape: as the model has it.
        dtype: as it is stored.
    """

    path: str
    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(numpy_dtype(self.dtype)).itemsize


class WeightFiles(Protocol):
    """The weights of one preset in one format."""

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        """Find variables and check shape and dtype, without reading their data."""

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Read variables, in the dtype in which they are stored."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that hold weights, within the preset."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype for a name of Keras, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def check_stored(
    where: str, *, shape: tuple[int, ...], dtype: str, expected_shape: tuple[int, ...], kind: str
) -> None:
    """Check that a stored value fits its variable; any float will do for a float.

    Args:
        where: file and dataset, for the message.
        shape: the stored one.
        dtype: the stored one, by NumPy's name or "bfloat16".
        expected_shape: the variable's.
        kind: the variable's dtype.

    Raises:
        SourceError: it does not fit.
    """
    if shape != expected_shape:
        raise SourceError(
            f"{where}: shape {shape}, where config.json asks for {expected_shape}; weights and "
            "config are not of the same model"
        )
    fits = dtype in _FLOATS if kind in _FLOATS else dtype == kind
    if not fits:
        raise SourceError(
            f"{where}: dtype {dtype}, where {kind} is expected; a source must be a float model"
            + (" that says which 2-byte type it uses" if dtype == "|V2" else "")
        )
