"""Weights as Keras saves them: `model.weights.h5`, or shards with `model.weights.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, SourceError
from pipeline.model.preset import INDEX_FILE, TASK_WEIGHTS_FILE, PresetFiles
from pipeline.model.skeleton import Skeleton
from pipeline.model.weight_layout import StoredVariable
from pipeline.weights.weight_files import RangedFile, SourceVariable, check_stored

_T = TypeVar("_T")

_SINGLE = "model.weights.h5"
# HDF5 always decompresses a whole chunk.
_MAX_CHUNK_BYTES = 64 << 20
# Smaller ones lie close together, and come with the blocks that are read for others.
_LARGE_BYTES = 64 << 10


@dataclass(frozen=True)
class Hdf5Weights:
    """Implements `WeightFiles`."""

    preset: PresetFiles
    skeleton: Skeleton

    @property
    def file_names(self) -> tuple[str, ...]:
        return tuple(sorted({name for _, files in self._locations.values() for name in files}))

    def prepare(self) -> None:
        _ = self._locations

    def locate(self, paths: tuple[str, ...]) -> dict[str, SourceVariable]:
        return self._visit(paths, lambda variable, _: variable)

    def read(self, paths: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        return self._visit(paths, self._value)

    def _value(self, variable: SourceVariable, dataset: h5py.Dataset) -> NDArray[Any]:
        start = _contiguous_from(dataset) if dataset.nbytes >= _LARGE_BYTES else None
        if start is None:
            value = np.empty(dataset.shape, dataset.dtype)
            if value.size:
                dataset.read_direct(value)
        else:
            # Not through h5py: while it waits for a store, no other thread can use it, such as the
            # one that commits a block.
            data = self.preset.read(variable.file, start, start + dataset.nbytes)
            value = np.frombuffer(data, dataset.dtype).reshape(dataset.shape)
        return value.view(np.dtype(variable.dtype))

    def _visit(
        self, paths: tuple[str, ...], take: Callable[[SourceVariable, h5py.Dataset], _T]
    ) -> dict[str, _T]:
        """The result of `take` for each variable and its checked dataset, file by file."""
        missing = {path: self._locations[path] for path in paths}
        for path, (_, files) in missing.items():
            for name in files:
                if name not in self.preset.sizes:
                    raise SourceError(f"{self.preset.url}: {name} is missing, which holds {path}")
        taken: dict[str, _T] = {}
        for name in sorted({name for _, files in missing.values() for name in files}):
            url = f"{self.preset.url}/{name}"
            source = RangedFile(self.preset, name)
            with _naming_errors(url, source):
                file = h5py.File(source, "r")
            with file:
                for path, (stored, files) in list(missing.items()):
                    if name not in files:
                        continue
                    where = f"{url}: {stored.key}"
                    with _naming_errors(where, source):
                        dataset = _find(file, stored.key, where)
                        if dataset is not None:
                            del missing[path]
                            taken[path] = take(_checked(dataset, stored, name, where), dataset)
        for path, (stored, files) in missing.items():
            raise SourceError(
                f"{self.preset.url}/{' or '.join(files)}: {stored.key}, which holds {path}, is "
                "missing; the weights are incomplete, or of another model"
            )
        return {path: taken[path] for path in paths}

    @cached_property
    def _locations(self) -> dict[str, tuple[StoredVariable, tuple[str, ...]]]:
        """Each variable by path, and the files that may hold it: Keras may split a group."""
        # KerasHub prefers a single file where there are both.
        single = _SINGLE in self.preset.sizes or INDEX_FILE not in self.preset.json_files
        shards = {} if single else self.preset.weight_map(INDEX_FILE)
        locations = {}
        for stored in self.skeleton.stored:
            files = (_SINGLE,) if single else shards.get(f"/{stored.h5_group}")
            if files is None:
                raise SourceError(
                    f"{self.preset.url}/{INDEX_FILE}: its weight_map lacks /{stored.h5_group}"
                )
            locations[str(stored.variable.path)] = stored, files
        for stored in self.skeleton.stored_by_task:
            locations.setdefault(str(stored.variable.path), (stored, (TASK_WEIGHTS_FILE,)))
        return locations


@contextmanager
def _naming_errors(where: str, source: RangedFile) -> Iterator[None]:
    """Name the file and dataset in HDF5's errors, or raise the storage error behind them."""
    try:
        yield
    except PipelineError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if source.failure is not None:
            raise source.failure from error
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{where}: damaged, or not HDF5 ({reason}); copy the file again"
        ) from error


def _find(file: h5py.File, key: str, where: str) -> h5py.Dataset | None:
    """Find a dataset through hard links only: other links may lead out of the file."""
    groups = key.split("/")
    if groups[0] == "layers" and "layers" not in file:
        # The name that Keras used before version 3.
        groups[0] = "_layer_checkpoint_dependencies"
    item: Any = file
    for part in groups:
        if not isinstance(item, h5py.Group) or part not in item:
            return None
        link = item.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise SourceError(
                f"{where}: reached by {type(link).__name__}, which may lead out of the file; save "
                "the model again with Keras"
            )
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise SourceError(f"{where}: a group, where a dataset is expected")
    return item


def _checked(
    dataset: h5py.Dataset, stored: StoredVariable, name: str, where: str
) -> SourceVariable:
    """Check that a dataset fits its variable, and cannot take more memory than that."""
    if dataset.is_virtual or dataset.external:
        raise SourceError(f"{where}: its data is in other files; save the model again with Keras")
    if dataset.shape is None or dataset.dtype.hasobject:
        raise SourceError(f"{where}: does not hold numbers; save the model again with Keras")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise SourceError(
            f"{where}: chunks of {dataset.chunks} are larger than {_MAX_CHUNK_BYTES} bytes"
        )
    dtype = str(dataset.dtype)
    # Keras stores bfloat16 as two opaque bytes, and the type in an attribute.
    if dataset.dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        dtype = "bfloat16"
    check_stored(where, tuple(dataset.shape), dtype, stored.variable)
    path = str(stored.variable.path)
    return SourceVariable(path=path, file=name, key=stored.key, shape=stored.shape, dtype=dtype)


def _contiguous_from(dataset: h5py.Dataset) -> int | None:
    """Where a dataset's values begin in its file; None if they are not there as they are.

    The dataset is checked: its values are numbers, and in this file.
    """
    plain = dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    if not plain or not dataset.dtype.isnative or dataset.file.userblock_size:
        return None
    # Otherwise some were never written, and are what the dataset says instead.
    if dataset.id.get_storage_size() != dataset.nbytes:
        return None
    start: int | None = dataset.id.get_offset()
    return start
