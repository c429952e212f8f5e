"""The artifact as stock Keras reads it: one weights file per block, and an index of them.

A part is the content of one file: part 0 holds everything outside the blocks (embeddings, final
norm), part i + 1 all of block i. Parts are cut from the layout of the *quantized* skeleton, so
each is known, down to its size in memory, before anything is solved.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.weights_file import read_weights_file, weights_file_bytes
from pipeline.canonical import canonical_json
from pipeline.errors import ArtifactError, WeightsFileError
from pipeline.model.weight_layout import StoredVariable


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one file of the artifact holds."""

    number: int
    """0 for everything outside the blocks, i + 1 for block i."""
    variables: tuple[StoredVariable, ...]
    """In Keras' order."""

    @property
    def file(self) -> str:
        """Keras' own name: its loader opens model_00000 before it reads the index."""
        return f"model_{self.number:05d}.weights.h5"

    @property
    def num_bytes(self) -> int:
        """In memory; the file may be smaller."""
        return sum(variable.num_bytes for variable in self.variables)

    def layer_values(
        self, layer_path: str, variables: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """One solved layer's variables by `name_path`, in the dtypes that Keras stores.

        Args:
            layer_path: of a layer in this part.
            variables: by the layer's own names, as `quantizer.keras_format` returns them.

        Raises:
            ArtifactError: no such layer in this part, or none of its variables has that name.
        """
        own = {stored.name: stored for stored in self.variables if stored.layer_path == layer_path}
        unknown = sorted(set(variables) - set(own))
        if unknown:
            raise ArtifactError(
                f"{self.file}: {layer_path} has no variable {unknown[0]!r} but {sorted(own)}; does "
                "its dtype policy match its scheme?"
            )
        return {
            own[name].name_path: _in_dtype(value, np.dtype(own[name].dtype))
            for name, value in variables.items()
        }


def cut_parts(
    layout: Sequence[StoredVariable], blocks: Sequence[keras.layers.Layer]
) -> tuple[Part, ...]:
    """Sort a layout's variables into the files of the artifact.

    Args:
        layout: `weight_layout` of a backbone.
        blocks: the backbone's transformer blocks, in order: layers of that same model.

    Returns:
        len(blocks) + 1 parts; a variable shared by several blocks is in the first one's.

    Raises:
        ArtifactError: a block without variables (of another model, or not built).
    """
    part_of_variable: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for variable in block.variables:
            part_of_variable.setdefault(id(variable), index + 1)
    # A group is one layer's own variables; it is never spread over files.
    part_of_group: dict[str, int] = {}
    for stored in layout:
        part_of_group.setdefault(stored.h5_group, part_of_variable.get(id(stored.variable), 0))
    parts = tuple(
        Part(
            number=number,
            variables=tuple(
                stored for stored in layout if part_of_group[stored.h5_group] == number
            ),
        )
        for number in range(len(blocks) + 1)
    )
    for part in parts[1:]:
        if not part.variables:
            raise ArtifactError(
                f"{blocks[part.number - 1].name}: no variable of this block is in the layout; take "
                "layout and blocks from the same model"
            )
    return parts


def encode_part(
    part: Part,
    values: Mapping[str, NDArray[Any]],
    *,
    compressed_layers: Container[str] = frozenset(),
) -> bytes:
    """The file of a part: the same bytes for the same arguments.

    Args:
        part: from `cut_parts`.
        values: an array for each of the part's variables, by `StoredVariable.name_path`, with the
            variable's own shape and dtype. Quantized layers' come from `quantizer.keras_format`,
            all others from the source.
        compressed_layers: paths of layers whose kernels have few distinct values (float8).

    Raises:
        ArtifactError: a variable without a value, a value without a variable, or a wrong shape
            or dtype: stock Keras would reject the file, or misread it.
    """
    paths = [variable.name_path for variable in part.variables]
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ArtifactError(f"{part.file}: more than one variable at {repeated}")
    _check_complete(part.file, paths, values)
    groups: dict[str, list[NDArray[Any]]] = {}
    compressed = set()
    for variable in part.variables:
        value = values[variable.name_path]
        _check_value(part.file, variable, value)
        group = groups.setdefault(variable.h5_group, [])
        if variable.name == "kernel" and variable.layer_path in compressed_layers:
            compressed.add(f"{variable.h5_group}/{len(group)}")
        group.append(value)
    return weights_file_bytes(groups, compressed=compressed)


def decode_part(part: Part, data: bytes) -> dict[str, NDArray[Any]]:
    """The inverse of `encode_part`: every variable's value by its `name_path`.

    Raises:
        WeightsFileError: a file that is damaged, hostile, or does not hold exactly this part.
    """
    groups = read_weights_file(data, max_bytes=part.num_bytes)
    expected: dict[str, list[StoredVariable]] = {}
    for variable in part.variables:
        expected.setdefault(variable.h5_group, []).append(variable)
    found = {name: len(arrays) for name, arrays in groups.items()}
    wanted = {name: len(variables) for name, variables in expected.items()}
    odd = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if odd:
        raise WeightsFileError(
            f"{part.file}: {odd[0]} holds {found.get(odd[0], 0)} arrays where the model has "
            f"{wanted.get(odd[0], 0)}; it is not of this model"
        )
    values = {}
    for name, variables in expected.items():
        for variable, value in zip(variables, groups[name], strict=True):
            try:
                _check_value(part.file, variable, value)
            except ArtifactError as error:
                raise WeightsFileError(f"{error}; the file is not of this model") from None
            values[variable.name_path] = value
    return values


def weights_index(parts: Iterable[Part]) -> bytes:
    """The content of model.weights.json, where stock Keras finds each layer's file."""
    total_bytes = 0
    weight_map: dict[str, str] = {}
    for part in parts:
        total_bytes += part.num_bytes
        # Keras looks a layer up by the absolute path of its group.
        weight_map |= {f"/{variable.h5_group}": part.file for variable in part.variables}
    return canonical_json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _in_dtype(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    # Solvers work in float32 with scales that are exact in the layer's dtype. Codes stay codes.
    return value if dtype.kind in "iu" else value.astype(dtype)


def _check_complete(file: str, paths: Sequence[str], values: Mapping[str, NDArray[Any]]) -> None:
    missing = sorted(set(paths) - set(values))
    if missing:
        raise ArtifactError(f"{file}: no value for {missing[0]} ({len(missing)} missing in all)")
    unknown = sorted(set(values) - set(paths))
    if unknown:
        raise ArtifactError(
            f"{file}: {unknown[0]} is no variable of this file ({len(unknown)} such values in all)"
        )


def _check_value(file: str, variable: StoredVariable, value: NDArray[Any]) -> None:
    if value.shape != variable.shape or value.dtype != np.dtype(variable.dtype):
        raise ArtifactError(
            f"{file}: {variable.name_path} is {value.dtype}{list(value.shape)} where Keras reads "
            f"{variable.dtype}{list(variable.shape)}"
        )
