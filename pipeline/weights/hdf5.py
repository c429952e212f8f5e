"""Weights as Keras saves them: `model.weights.h5`, or shards with `model.weights.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, SourceError
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import Skeleton
from pipeline.model.weight_layout import StoredVariable
from pipeline.weights.weight_files import (
    Meter,
    RangedFile,
    SourceVariable,
    check_stored,
    numpy_dtype,
)

_T = TypeVar("_T")

_SINGLE = "model.weights.h5"
_MAP = "model.weights.json"
_TASK = "task.weights.h5"
# A chunk is decompressed whole, however little of it is asked for.
_MAX_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class _Place:
    """A variable and the files that may hold it (Keras may cut one group in two)."""

    stored: StoredVariable
    files: tuple[str, ...]


@dataclass(frozen=True)
class Hdf5Weights:
    """Implements `WeightFiles`."""

    preset: PresetFiles
    skeleton: Skeleton
    meter: Meter = field(default_factory=Meter)

    @property
    def file_names(self) -> tuple[str, ...]:
        names = {name for place in self._places.values() for name in place.files}
        return tuple(sorted(names))

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        return self._visit(paths, lambda variable, _: variable)

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        return self._visit(paths, _value)

    def _visit(
        self, paths: tuple[str, ...], take: Callable[[SourceVariable, h5py.Dataset], _T]
    ) -> dict[str, _T]:
        """What `take` makes of each variable and its dataset, checked; file by file."""
        missing = {path: self._place(path) for path in paths}
        taken: dict[str, _T] = {}
        for name in sorted({name for place in missing.values() for name in place.files}):
            with _open(self.preset, name, self.meter) as file:
                for path, place in list(missing.items()):
                    if name not in place.files:
                        continue
                    where = f"{self.preset.url}/{name}: {place.stored.key}"
                    with _naming(where, file.source):
                        dataset = _find(file.hdf5, place.stored.key, where)
                        if dataset is not None:
                            del missing[path]
                            variable = _checked(dataset, place.stored, name, where)
                            taken[path] = take(variable, dataset)
        for path, place in missing.items():
            raise SourceError(
                f"{self.preset.url}/{' or '.join(place.files)}: {place.stored.key} is missing, "
                f"which holds {path}; the weights are incomplete, or of another model"
            )
        return {path: taken[path] for path in paths}

    def _place(self, path: str) -> _Place:
        place = self._places[path]
        for name in place.files:
            if name not in self.preset.sizes:
                raise SourceError(f"{self.preset.url}: {name} is missing, which holds {path}")
        return place

    @cached_property
    def _places(self) -> dict[str, _Place]:
        shards = self._shards()
        places = {}
        for stored in self.skeleton.stored:
            files = shards.get(f"/{stored.h5_group}") if shards else (_SINGLE,)
            if files is None:
                raise SourceError(
                    f"{self.preset.url}/{_MAP}: /{stored.h5_group} is missing from its weight_map"
                )
            places[str(stored.variable.path)] = _Place(stored, files)
        for stored in self.skeleton.stored_by_task:
            places.setdefault(str(stored.variable.path), _Place(stored, (_TASK,)))
        return places

    def _shards(self) -> Mapping[str, tuple[str, ...]] | None:
        """Files by group, or None for a single file (which KerasHub prefers)."""
        if _SINGLE in self.preset.sizes or _MAP not in self.preset.json_files:
            return None
        weight_map = self.preset.parse(_MAP).get("weight_map")
        if not isinstance(weight_map, dict):
            raise SourceError(f"{self.preset.url}/{_MAP}: it lacks a weight_map")
        shards = {}
        for group, names in weight_map.items():
            listed = names if isinstance(names, list) else [names]
            for name in listed:
                if not isinstance(name, str) or "/" in name:
                    raise SourceError(f"{self.preset.url}/{_MAP}: {name!r} is no file beside it")
            shards[str(group)] = tuple(listed)
        return shards


@dataclass(frozen=True)
class _OpenFile:
    hdf5: h5py.File
    source: RangedFile


@contextmanager
def _open(preset: PresetFiles, name: str, meter: Meter) -> Iterator[_OpenFile]:
    source = RangedFile(preset, name, meter)
    with _naming(f"{preset.url}/{name}", source):
        file = h5py.File(source, "r")
    with file:
        yield _OpenFile(file, source)


@contextmanager
def _naming(where: str, source: RangedFile) -> Iterator[None]:
    """Say of what place HDF5 complains."""
    try:
        yield
    except PipelineError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if source.failure is not None:
            raise source.failure from error
        reason = " ".join(str(error).split())
        raise SourceError(f"{where}: damaged, or no HDF5 ({reason}); copy the file anew") from error


def _find(file: h5py.File, key: str, where: str) -> h5py.Dataset | None:
    """Walk to a dataset by hard links alone: others may lead anywhere."""
    groups = key.split("/")
    if groups[0] == "layers" and "layers" not in file:
        # As Keras saved before its version 3.
        groups[0] = "_layer_checkpoint_dependencies"
    item: Any = file
    for part in groups:
        if not isinstance(item, h5py.Group) or part not in item:
            return None
        link = item.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise SourceError(
                f"{where}: reached by {type(link).__name__}, which may lead anywhere; save the "
                "model again with Keras"
            )
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise SourceError(f"{where}: a group, where a dataset is expected")
    return item


def _checked(
    dataset: h5py.Dataset, stored: StoredVariable, name: str, where: str
) -> SourceVariable:
    """Check that a dataset is what its variable needs, and takes no more memory than that."""
    if dataset.is_virtual or dataset.external:
        raise SourceError(f"{where}: its data is in other files; save the model again with Keras")
    if dataset.shape is None or dataset.dtype.hasobject:
        raise SourceError(f"{where}: holds no numbers")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise SourceError(
            f"{where}: chunks of {dataset.chunks} are larger than {_MAX_CHUNK_BYTES} bytes"
        )
    dtype = str(dataset.dtype)
    # Keras keeps bfloat16 as two bytes of no type, and the type beside them.
    if dataset.dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        dtype = "bfloat16"
    check_stored(
        where,
        shape=tuple(dataset.shape),
        dtype=dtype,
        expected_shape=stored.shape,
        kind=stored.dtype,
    )
    return SourceVariable(
        path=str(stored.variable.path),
        file=name,
        key=stored.key,
        shape=stored.shape,
        dtype=dtype,
    )


def _value(variable: SourceVariable, dataset: h5py.Dataset) -> NDArray[Any]:
    value = np.empty(dataset.shape, dataset.dtype)
    if value.size:
        dataset.read_direct(value)
    return value.view(numpy_dtype(variable.dtype))
