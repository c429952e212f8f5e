"""Weights as Hugging Face keeps them: `model.safetensors`, or shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.huggingface import Conversion, record_conversion
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import build_skeleton
from pipeline.weights.weight_files import SourceVariable, check_stored

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Tensor:
    """Bytes [start, stop) of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsWeights:
    """Implements `WeightFiles`."""

    preset: PresetFiles
    _headers: dict[str, dict[str, _Tensor]] = field(default_factory=dict, repr=False)

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._tensors.values())))

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        return {path: self._locate(path) for path in paths}

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        return {path: self._read(path) for path in paths}

    def _locate(self, path: str) -> SourceVariable:
        conversion, variable = self._conversion(path), self._variables[path]
        shape = tuple(variable.shape)
        if conversion.constant is not None:
            dtype = str(conversion.constant.dtype)
            return SourceVariable(path=path, file="", key="", shape=shape, dtype=dtype)
        file = self._tensors[conversion.tensor]
        tensor = self._tensor(conversion.tensor)
        # Hooks transpose, reshape, or take a part of a tensor, so only too small a tensor is
        # certainly wrong here; what a hook returns is checked when it is read.
        if conversion.hook is None or math.prod(tensor.shape) < math.prod(shape):
            where = f"{self.preset.url}/{file}: {conversion.tensor}"
            check_stored(where, tensor.shape, str(tensor.dtype), variable)
        return SourceVariable(
            path=path, file=file, key=conversion.tensor, shape=shape, dtype=str(tensor.dtype)
        )

    def _read(self, path: str) -> NDArray[Any]:
        located, conversion = self._locate(path), self._conversion(path)
        if conversion.constant is not None:
            return conversion.constant
        tensor = self._tensor(conversion.tensor)
        data = self.preset.read(located.file, tensor.start, tensor.stop)
        value: NDArray[Any] = np.frombuffer(data, tensor.dtype).reshape(tensor.shape)
        if conversion.hook is not None:
            value = np.asarray(conversion.hook(value, list(located.shape)))
        where = f"{self.preset.url}/{located.file}: {conversion.tensor}, as converted for {path}"
        check_stored(where, value.shape, str(value.dtype), self._variables[path])
        return value

    def _conversion(self, path: str) -> Conversion:
        if path not in self._conversions:
            raise SourceError(
                f"{self.preset.url}: KerasHub's converter gives {path} no value; load the model "
                "with KerasHub, save_to_preset, and name that folder instead"
            )
        return self._conversions[path]

    @cached_property
    def _skeleton(self) -> Any:
        # Separate from other skeletons, since a converter may assign to it.
        return build_skeleton(self.preset)

    @cached_property
    def _variables(self) -> Mapping[str, Any]:
        return {str(variable.path): variable for variable in self._skeleton.model.variables}

    @cached_property
    def _conversions(self) -> Mapping[str, Conversion]:
        return record_conversion(self.preset, self._skeleton.backbone, self._tensors)

    @cached_property
    def _tensors(self) -> Mapping[str, str]:
        """File of each tensor."""
        if _INDEX not in self.preset.json_files:
            return dict.fromkeys(self._header(_SINGLE), _SINGLE)
        return {name: files[0] for name, files in self.preset.weight_map(_INDEX).items()}

    def _tensor(self, name: str) -> _Tensor:
        file = self._tensors[name]
        header = self._header(file)
        if name not in header:
            raise SourceError(
                f"{self.preset.url}/{file}: tensor {name} is missing, although {_INDEX} lists it; "
                "copy the file again"
            )
        return header[name]

    def _header(self, file: str) -> dict[str, _Tensor]:
        if file not in self._headers:
            self._headers[file] = _read_header(self.preset, file)
        return self._headers[file]


def _read_header(preset: PresetFiles, file: str) -> dict[str, _Tensor]:
    """The header of a safetensors file, each entry checked against the file's size."""
    where = f"{preset.url}/{file}"
    size = preset.sizes.get(file, 0)
    length = int.from_bytes(preset.read(file, 0, min(8, size)), "little")
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise SourceError(f"{where}: not a safetensors file, or truncated; copy it again")
    data_start = 8 + length
    try:
        table = json.loads(preset.read(file, 8, data_start))
        return {
            name: _entry(table[name], data_start, size) for name in table if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(f"{where}: damaged header ({error}); copy the file again") from None


def _entry(entry: Mapping[str, Any], data_start: int, size: int) -> _Tensor:
    dtype = _DTYPES.get(entry["dtype"], np.dtype(np.void))
    shape = tuple(int(length) for length in entry["shape"])
    start, stop = (data_start + int(offset) for offset in entry["data_offsets"])
    if not data_start <= start <= stop <= size:
        raise ValueError(f"bytes {start} to {stop} of a file of {size}: truncated")
    if dtype != np.void and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{stop - start} bytes for {shape} of {entry['dtype']}")
    return _Tensor(dtype, shape, start, stop)
