"""A source model's weights, read variable by variable; never more than is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.canonical import sha256
from pipeline.errors import SourceError
from pipeline.model.blocks import BlockGraph
from pipeline.model.preset import PresetFiles, decides_model
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.weights.digests import SizedPath
from pipeline.weights.hdf5 import Hdf5Weights
from pipeline.weights.safetensors import SafetensorsWeights
from pipeline.weights.weight_files import SourceVariable, WeightFiles, num_not_finite


@dataclass(frozen=True)
class Source:
    """One preset's weights."""

    preset: PresetFiles
    skeleton: Skeleton
    weights: WeightFiles

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of all stored variables, in the order in which Keras saves them."""
        stored = (*self.skeleton.stored, *self.skeleton.stored_by_task)
        paths = [str(variable.variable.path) for variable in stored]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise SourceError(
                f"{self.preset.url}: two variables have the path {repeated[0]}; give layers unique "
                "names, so that each can be quantized on its own"
            )
        return tuple(paths)

    def prepare(self) -> None:
        """Find out what every reading needs, after which several threads may read.

        Raises: as for `variables`.
        """
        _ = self.paths, self._dtypes
        self.weights.prepare()

    def variables(self) -> Mapping[str, SourceVariable]:
        """Where each variable is stored, checked for shape and dtype.

        Raises:
            SourceError: a file or dataset is missing, damaged, or of another model.
        """
        return self._variables

    @cached_property
    def _variables(self) -> Mapping[str, SourceVariable]:
        return self.weights.locate(self.paths)

    def check_complete(self) -> None:
        """Check that the model takes everything that its weights files hold, or loses nothing.

        Raises:
            SourceError: a tensor that KerasHub's converter would drop in silence.
        """
        if isinstance(self.weights, SafetensorsWeights):
            self.weights.check_complete()

    def casts(self) -> dict[str, int]:
        """How many variables are read in another dtype than stored, by "stored to read"."""
        changes = [
            f"{variable.dtype} to {self._dtypes[path]}"
            for path, variable in self.variables().items()
            if variable.dtype != self._dtypes[path]
        ]
        return {change: changes.count(change) for change in sorted(set(changes))}

    def read(self, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read variables in the dtypes that the model gives them, cast as Keras casts on loading.

        Raises:
            SourceError: as for `variables`, a path of no stored variable, or values that are not
                finite.
        """
        wanted = tuple(paths)
        for path in set(wanted) - set(self.paths):
            raise SourceError(f"{self.preset.url}: no weights file holds a variable {path}")
        values = self.weights.read(wanted)
        return {path: self._finite(path, values.pop(path)) for path in wanted}

    def _finite(self, path: str, stored: NDArray[Any]) -> NDArray[Any]:
        """A variable's value in its dtype."""
        dtype = np.dtype(self._dtypes[path])
        with np.errstate(over="ignore"):  # reported below
            value = stored.astype(dtype, copy=False)
        num_bad = num_not_finite(value)
        if num_bad:
            [variable] = self.weights.locate((path,)).values()
            where = f"{self.preset.url}/{variable.file}: {variable.key or path}"
            first = np.argwhere(~np.isfinite(value))[0].tolist()  # of experts, which one
            if num_not_finite(stored):
                raise SourceError(
                    f"{where}: {num_bad} of {value.size} values are NaN or infinite, the first at "
                    f"{first}, and so would the model's answers be; repair the model, or download "
                    "the file again"
                )
            raise SourceError(
                f"{where}: {num_bad} of {value.size} values are too large for {dtype}, the first "
                f"at {first}; keep the model's own dtype, or use bfloat16 or float32"
            )
        return value

    @cached_property
    def _dtypes(self) -> Mapping[str, str]:
        stored = (*self.skeleton.stored, *self.skeleton.stored_by_task)
        return {str(variable.variable.path): variable.dtype for variable in stored}

    def read_layer(self, layer: keras.layers.Layer) -> dict[str, NDArray[Any]]:
        """Read the stored variables of one layer, such as a block, of any skeleton."""
        return self.read(self.layer_paths(layer))

    def layer_paths(self, layer: keras.layers.Layer) -> tuple[str, ...]:
        """Paths of a layer's stored variables (random states are not stored)."""
        known = set(self.paths)
        paths = dict.fromkeys(str(variable.path) for variable in layer.variables)
        return tuple(path for path in paths if path in known)

    def rest_paths(self, graph: BlockGraph) -> tuple[str, ...]:
        """Paths of all stored variables outside the blocks."""
        inside = {path for block in graph.blocks for path in self.layer_paths(block.layer)}
        return tuple(path for path in self.paths if path not in inside)

    def sized(self, paths: Iterable[str]) -> tuple[SizedPath, ...]:
        """Variables, each with its bytes as stored."""
        found = self.variables()
        return tuple((path, found[path].num_bytes) for path in paths)

    def files_digest(self) -> str:
        """SHA-256 of JSON and vocabularies, and of the names and sizes of weights files."""
        entries = {}
        names = {*self.weights.file_names, *self.preset.json_files, *self.preset.assets}
        for name in sorted(name for name in names if decides_model(name)):
            content = self.preset.stored_json.get(name, self.preset.json_files.get(name))
            if content is None and name not in self.weights.file_names:
                content = self.preset.read(name)
            known = None if content is None else sha256(content)
            entries[name] = [self.preset.sizes[name], known]
        return sha256(json.dumps(entries, sort_keys=True).encode())


def open_source(preset: PresetFiles, skeleton: Skeleton | None = None) -> Source:
    """Open a preset's weights; nothing is read yet."""
    skeleton = skeleton or build_skeleton(preset)
    if preset.format == "huggingface":
        return Source(preset, skeleton, SafetensorsWeights(preset))
    return Source(preset, skeleton, Hdf5Weights(preset, skeleton))
