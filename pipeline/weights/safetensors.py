"""Weights as Hugging Face keeps them: `model.safetensors`, or shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.conversion_recording import record_conversion
from pipeline.model.huggingface import Conversion, Conversions, converted_value
from pipeline.model.preset import CONFIG_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX_FILE, PresetFiles
from pipeline.model.recorded_tensors import (
    ReadStored,
    Step,
    Stored,
    carried_out,
    stacked,
    stored_tensors,
)
from pipeline.model.skeleton import build_skeleton
from pipeline.weights.mxfp4 import are_mxfp4, decoded
from pipeline.weights.unused_tensors import check_unused
from pipeline.weights.weight_files import SourceVariable, check_stored

_MAX_HEADER_BYTES = 100 << 20
_MAX_COMPUTED_BYTES = 256 << 20
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {"U8": np.dtype(np.uint8)}
"""Of tensors that a converter decodes."""


def _value_of(values: Mapping[str, NDArray[Any]], tensor: Stored) -> NDArray[Any]:
    return values[tensor.name]


@dataclass(frozen=True)
class _Tensor:
    """Bytes [start, stop) of a file."""

    dtype: np.dtype[Any]
    """np.void for one that is not among those read here."""
    stored_dtype: str
    """As the file names it: BF16, F8_E4M3, …"""
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsWeights:
    """Implements `WeightFiles`."""

    preset: PresetFiles
    _headers: dict[str, dict[str, _Tensor]] = field(default_factory=dict, repr=False)
    _computed: dict[str, int] = field(default_factory=dict, repr=False)
    """Bytes of each tensor with which the converter computes."""

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._tensors.values())))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors in the files."""
        return tuple(sorted(self._tensors))

    def prepare(self) -> None:
        _ = self._conversions, self._variables

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        return {path: self._locate(path) for path in paths}

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        return {path: self._read(path) for path in paths}

    def check_complete(self) -> None:
        """Check that every tensor of the files is used, or is known to be of no use here.

        Raises:
            SourceError: a tensor that KerasHub's converter would drop in silence.
        """
        used = self._conversions.tensors
        unused = tuple(name for name in sorted(self._tensors) if name not in used)
        check_unused(
            self.preset,
            self._skeleton,
            {name: self._tensor(name).shape for name in unused},
            self._data,
        )

    def _locate(self, path: str) -> SourceVariable:
        conversion, variable = self._conversion(path), self._variables[path]
        shape = tuple(variable.shape)
        if conversion.constant is not None:
            dtype = str(conversion.constant.dtype)
            return SourceVariable(path=path, file="", key="", shape=shape, dtype=dtype)
        if conversion.recipe is not None:
            return self._locate_made(path, conversion.recipe)
        tensor = self._tensor(conversion.tensor)
        self._check_dtype(conversion.tensor)
        # No hook looks at values, and one number stands for them all: nothing is read or copied.
        number = np.zeros((), tensor.dtype)
        self._converted(path, np.broadcast_to(number, tensor.shape))
        return SourceVariable(
            path=path,
            file=self._tensors[conversion.tensor],
            key=conversion.tensor,
            shape=shape,
            dtype=str(tensor.dtype),
        )

    def _locate_made(self, path: str, recipe: Step) -> SourceVariable:
        """A variable that is made of several tensors; none is read."""
        variable, tensors = self._variables[path], stored_tensors(recipe)
        decoded = self._conversion(path).of_a_row is not None
        for tensor in tensors:
            if not (decoded and self._tensor(tensor.name).stored_dtype in _CODES):
                self._check_dtype(tensor.name)
        first, last = tensors[0].name, tensors[-1].name
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        where = f"{self.preset.url}: {first} to {last}, joined for {path}"
        if len(dtypes) > 1 and not decoded:
            raise SourceError(
                f"{where}: stored as {' and '.join(dtypes)}; save the model in one dtype"
            )
        dtype = str(variable.dtype) if decoded else dtypes[0]
        assert recipe.shape is not None
        check_stored(where, recipe.shape, dtype, variable)
        return SourceVariable(
            path=path,
            file=self._tensors[first],
            key=first if first == last else f"{first} to {last}",
            shape=tuple(variable.shape),
            dtype=dtype,
        )

    def _read(self, path: str) -> NDArray[Any]:
        conversion = self._conversion(path)
        if conversion.constant is not None:
            return conversion.constant
        if conversion.recipe is not None:
            self._locate_made(path, conversion.recipe)
            if conversion.of_a_row is not None:
                return self._decoded(path, conversion.of_a_row)
            return carried_out(conversion.recipe, lambda stored: self._data(stored.name))
        value = self._data(conversion.tensor)
        converted = self._converted(path, value)
        # Of a tensor that several variables share, each is to hold no more than its own.
        return converted.copy("K") if converted.nbytes < value.nbytes else converted

    def _decoded(self, path: str, of_a_row: Step) -> NDArray[Any]:
        """A variable whose values are not those of its tensors, made row by row in its own dtype.

        Several values are held for each while it is computed, and most in float32. Those of MXFP4
        are looked up, if that gives for the first row what the converter computes.
        """
        variable, tensors = self._variables[path], stored_tensors(of_a_row)
        looked_up = are_mxfp4(tensors)

        def rows() -> Iterator[NDArray[Any]]:
            nonlocal looked_up
            for row in range(variable.shape[0]):
                read = self._row_reader(row)
                found = {tensor.name: read(tensor) for tensor in tensors}
                quick = decoded(*found.values()) if looked_up else None
                if row == 0 or quick is None:
                    made = carried_out(of_a_row, partial(_value_of, found))
                    looked_up = quick is not None and np.array_equal(quick, made)
                else:
                    made = quick
                yield made[0].astype(str(variable.dtype))

        return stacked(tuple(variable.shape), rows())

    def _row_reader(self, row: int) -> ReadStored:
        """Reads what tensors have for one index of their first axis, with that axis."""

        def read(stored: Stored) -> NDArray[Any]:
            tensor = self._tensor(stored.name)
            length = (tensor.stop - tensor.start) // tensor.shape[0]
            start = tensor.start + row * length
            data = self.preset.read(self._tensors[stored.name], start, start + length)
            return np.frombuffer(data, tensor.dtype).reshape(stored.shape)

        return read

    def _converted(self, path: str, value: NDArray[Any]) -> NDArray[Any]:
        """A tensor's value as KerasHub converts it for a variable; checked."""
        conversion, variable = self._conversion(path), self._variables[path]
        where = f"{self.preset.url}/{self._tensors[conversion.tensor]}: {conversion.tensor}"
        converted = converted_value(conversion, value, tuple(variable.shape), f"{where} for {path}")
        if conversion.hook is not None:
            where += f", stored as {value.shape} and converted for {path}"
        check_stored(where, converted.shape, str(converted.dtype), variable)
        return converted

    def _data(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored."""
        self._check_dtype(name)
        tensor = self._tensor(name)
        data = self.preset.read(self._tensors[name], tensor.start, tensor.stop)
        return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)

    def _small_data(self, name: str) -> NDArray[Any]:
        """A tensor with which the converter computes, which each process keeps in memory."""
        tensor = self._tensor(name)
        self._computed[name] = tensor.stop - tensor.start
        if sum(self._computed.values()) > _MAX_COMPUTED_BYTES:
            raise SourceError(
                f"{self.preset.url}: KerasHub's converter computes with tensor {name} and others "
                f"of more than {_MAX_COMPUTED_BYTES >> 20} MiB together; load the model with "
                "KerasHub, save_to_preset, and name that folder instead"
            )
        return self._data(name)

    def _check_dtype(self, name: str) -> None:
        tensor = self._tensor(name)
        if tensor.stored_dtype not in _DTYPES:
            raise SourceError(
                f"{self.preset.url}/{self._tensors[name]}: {name} is stored as "
                f"{tensor.stored_dtype}, where one of {', '.join(_DTYPES)} is expected; the model "
                "is already quantized, most likely: start from the float model"
            )

    def _conversion(self, path: str) -> Conversion:
        conversion = self._conversions.by_path.get(path)
        if conversion is None:
            raise SourceError(
                f"{self.preset.url}: KerasHub's converter gives {path} no value; load the model "
                "with KerasHub, save_to_preset, and name that folder instead"
            )
        return conversion

    @cached_property
    def _skeleton(self) -> Any:
        # Separate from other skeletons, since a converter may assign to it.
        return build_skeleton(self.preset)

    @cached_property
    def _variables(self) -> Mapping[str, Any]:
        return {str(variable.path): variable for variable in self._skeleton.model.variables}

    @cached_property
    def _conversions(self) -> Conversions:
        backbone = self._skeleton.backbone
        return record_conversion(
            self.preset, backbone, self._tensors, self._stored, self._small_data
        )

    def _stored(self, name: str) -> Stored:
        tensor = self._tensor(name)
        return Stored(name=name, shape=tensor.shape, dtype=tensor.dtype)

    @cached_property
    def _tensors(self) -> Mapping[str, str]:
        """File of each tensor."""
        names = self.preset.sizes
        if SAFETENSORS_FILE not in names and SAFETENSORS_INDEX_FILE not in names:
            raise SourceError(self._without_safetensors())
        if SAFETENSORS_INDEX_FILE not in self.preset.json_files:
            return dict.fromkeys(self._header(SAFETENSORS_FILE), SAFETENSORS_FILE)
        return {
            name: files[0] for name, files in self.preset.weight_map(SAFETENSORS_INDEX_FILE).items()
        }

    def _without_safetensors(self) -> str:
        message = f"{self.preset.url}: {SAFETENSORS_FILE} is missing, and so is its index"
        foreign = self.preset.foreign_weights
        if not foreign:
            return f"{message}; download the model's weights too"
        architectures = self.preset.parse(CONFIG_FILE).get("architectures") or ["AutoModel"]
        return (
            f"{message}; the weights are in {foreign[0]}, which may run code when it is read; "
            "where you trust it, convert it with Hugging Face's transformers: "
            f"{architectures[0]}.from_pretrained(folder).save_pretrained(new_folder)"
        )

    def _tensor(self, name: str) -> _Tensor:
        file = self._tensors[name]
        header = self._header(file)
        if name not in header:
            raise SourceError(
                f"{self.preset.url}/{file}: tensor {name} is missing, although "
                f"{SAFETENSORS_INDEX_FILE} lists it; copy the file again"
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
    stored_dtype = str(entry["dtype"])
    dtype = {**_DTYPES, **_CODES}.get(stored_dtype, np.dtype(np.void))
    shape = tuple(int(length) for length in entry["shape"])
    start, stop = (data_start + int(offset) for offset in entry["data_offsets"])
    if not data_start <= start <= stop <= size:
        raise ValueError(f"bytes {start} to {stop} of a file of {size}: truncated")
    if dtype != np.void and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{stop - start} bytes for {shape} of {stored_dtype}")
    return _Tensor(dtype, stored_dtype, shape, start, stop)
