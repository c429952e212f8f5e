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
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import Skeleton, build_skeleton
from pipeline.weights.hdf5 import Hdf5Weights
from pipeline.weights.safetensors import SafetensorsWeights
from pipeline.weights.weight_files import SourceVariable, WeightFiles

_DOCUMENTATION = (".md", ".rst", "LICENSE")


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

    def variables(self) -> Mapping[str, SourceVariable]:
        """Where each variable is stored, checked for shape and dtype.

        Raises:
            SourceError: a file or dataset is missing, damaged, or of another model.
        """
        return self.weights.locate(self.paths)

    def read(self, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Read variables in the dtype in which they are stored: float32, float16, bfloat16.

        Raises:
            SourceError: as for `variables`, or a path of no stored variable.
        """
        wanted = tuple(paths)
        for path in set(wanted) - set(self.paths):
            raise SourceError(f"{self.preset.url}: no weights file holds a variable {path}")
        return self.weights.read(wanted)

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

    def files_digest(self) -> str:
        """SHA-256 of JSON and vocabularies, and of the names and sizes of weights files."""
        entries = {}
        names = {*self.weights.file_names, *self.preset.json_files, *self.preset.assets}
        for name in sorted(name for name in names if not name.endswith(_DOCUMENTATION)):
            content = self.preset.json_files.get(name)
            if content is None and name not in self.weights.file_names:
                content = self.preset.read(name)
            known = None if content is None else sha256(content)
            entries[name] = [self.preset.sizes[name], known]
        return sha256(json.dumps(entries, sort_keys=True).encode())


def values_digest(values: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of variables' values by path, independent of how they are stored."""
    entries = {
        path: [
            str(value.dtype),
            list(value.shape),
            sha256(np.ascontiguousarray(value).view(np.uint8).data),
        ]
        for path, value in values.items()
    }
    return sha256(json.dumps(entries, sort_keys=True).encode())


def open_source(preset: PresetFiles, skeleton: Skeleton | None = None) -> Source:
    """Open a preset's weights; nothing is read yet."""
    skeleton = skeleton or build_skeleton(preset)
    if preset.format == "huggingface":
        return Source(preset, skeleton, SafetensorsWeights(preset))
    return Source(preset, skeleton, Hdf5Weights(preset, skeleton))
