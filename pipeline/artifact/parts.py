"""The artifact as stock Keras reads it: one weights file per block, an index and small files.

A part is the content of one file: part 0 holds everything outside the blocks (embeddings, final
norm), part i + 1 all of block i. Parts are cut from the layout of the *quantized* skeleton, so
each is known, down to its size in memory, before anything is solved.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.codes_file import codes_file_bytes
from pipeline.artifact.weights_file import read_weights_file, weights_file_bytes
from pipeline.canonical import canonical_json, sha256
from pipeline.errors import ArtifactError, WeightsFileError
from pipeline.model.preset import INDEX_FILE
from pipeline.model.preset_json import quantized_json
from pipeline.model.weight_layout import StoredVariable
from pipeline.plan import LayersOrigin, PartOrigin, Plan
from pipeline.run.commits import verify_and_seal
from pipeline.run.records import (
    ARTIFACT_PREFIX,
    CommittedRecord,
    FileDigest,
    LayerRecord,
    Manifest,
    PartRecord,
    TuningRecord,
    codes_key,
    file_key,
    manifest_of,
)
from pipeline.run.solved_layers import SolvedLayer
from pipeline.run.worker_api import Values
from pipeline.storage.object_store import ObjectStore
from quantizer.schemes import Float8Scheme


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
            ArtifactError: the layer in this part has no variable of that name.
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
    """Sort the variables of a backbone's layout into the files of the artifact.

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
    variables: list[list[StoredVariable]] = [[] for _ in range(len(blocks) + 1)]
    for stored in layout:
        variables[part_of_group[stored.h5_group]].append(stored)
    for block, own in zip(blocks, variables[1:], strict=True):
        if not own:
            raise ArtifactError(
                f"{block.name}: no variable of this block is in the layout; take layout and blocks "
                "from the same model"
            )
    return tuple(Part(number=i, variables=tuple(own)) for i, own in enumerate(variables))


def encode_part(
    part: Part,
    values: Mapping[str, NDArray[Any]],
    *,
    compressed_layers: Container[str] = frozenset(),
) -> bytes:
    """The file of a part: the same bytes for the same arguments.

    Args:
        values: an array for each of the part's variables, by `StoredVariable.name_path`, with the
            variable's own shape and dtype.
        compressed_layers: paths of layers whose kernels have few distinct values (float8).

    Raises:
        ArtifactError: a variable without a value, a value without a variable, or a wrong shape
            or dtype: stock Keras would reject the file, or misread it.
    """
    paths = [variable.name_path for variable in part.variables]
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ArtifactError(f"{part.file}: more than one variable at {repeated}")
    missing, unknown = sorted(set(paths) - set(values)), sorted(set(values) - set(paths))
    if missing:
        raise ArtifactError(
            f"{part.file}: no value for {missing[0]} ({len(missing)} missing in all)"
        )
    if unknown:
        raise ArtifactError(
            f"{part.file}: {unknown[0]} is no variable of this file ({len(unknown)} such values "
            "in all)"
        )
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
    return values_of(part, read_weights_file(data, max_bytes=part.num_bytes))


def values_of(part: Part, groups: Mapping[str, Sequence[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """A part's values by `name_path`, of the arrays of its file by HDF5 group.

    Raises:
        WeightsFileError: they are not exactly those of this part.
    """
    found = Counter({name: len(arrays) for name, arrays in groups.items()})
    expected = Counter(variable.h5_group for variable in part.variables)
    for name in sorted(found | expected):
        if found[name] != expected[name]:
            raise WeightsFileError(
                f"{part.file}: {name} holds {found[name]} arrays where the model has "
                f"{expected[name]}; it is not of this model"
            )
    values = {}
    unread = {name: iter(arrays) for name, arrays in groups.items()}
    for variable in part.variables:
        value = next(unread[variable.h5_group])
        try:
            _check_value(part.file, variable, value)
        except ArtifactError as error:
            raise WeightsFileError(f"{error}; the file is not of this model") from None
        values[variable.name_path] = value
    return values


def weights_index(parts: Sequence[Part]) -> bytes:
    """The content of model.weights.json, where stock Keras finds each layer's file."""
    total_bytes = sum(part.num_bytes for part in parts)
    # Keras looks a layer up by the absolute path of its group.
    weight_map = {f"/{stored.h5_group}": part.file for part in parts for stored in part.variables}
    return canonical_json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _in_dtype(value: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    # Solvers work in float32 with scales that are exact in the layer's dtype. Codes stay codes.
    return value if dtype.kind in "iu" else value.astype(dtype)


def _check_value(file: str, variable: StoredVariable, value: NDArray[Any]) -> None:
    if value.shape != variable.shape or value.dtype != np.dtype(variable.dtype):
        raise ArtifactError(
            f"{file}: {variable.name_path} is {value.dtype}{list(value.shape)} where Keras reads "
            f"{variable.dtype}{list(variable.shape)}"
        )


def encode_solved_part(
    plan: Plan,
    part: Part,
    previous: str,
    values: Values,
    solved: Mapping[str, SolvedLayer],
    tuning: TuningRecord | None = None,
) -> tuple[PartRecord, dict[str, bytes]]:
    """A part's record, and the files that it names, by storage key.

    Args:
        previous: digest of the record of the block before; "" where there is none.
        values: the source's arrays, by variable path, for all but the solved layers; with what
            tuning changed of them.
        solved: the quantized layers, by path.
        tuning: what training them together did.
    """
    arrays: dict[str, NDArray[Any]] = {}
    banks = {path: layer.codes for path, layer in solved.items() if layer.codes is not None}
    for path, layer in solved.items():
        if path not in banks:
            arrays |= part.layer_values(path, layer.variables)
    for stored in part.variables:
        path = str(stored.variable.path)
        if path in banks:
            arrays[stored.name_path] = banks[path].kernel(np.dtype(stored.dtype))
        elif stored.name_path not in arrays:
            arrays[stored.name_path] = values[path]
    layers = plan.parts[part.number].layers
    # Format 1 did not compress the kernels of float8.
    float8 = {layer.path for layer in layers if isinstance(layer.scheme, Float8Scheme)}
    compressed = set() if plan.weights_format == 1 else float8
    data = encode_part(part, arrays, compressed_layers=compressed)
    files = {file_key(part.number): data}
    if banks:
        files[codes_key(part.number)] = codes_file_bytes(banks)
    record = PartRecord(
        part=part.number,
        plan_digest=plan.digest,
        file=file_key(part.number),
        codes=FileDigest.of(files[codes_key(part.number)]) if banks else None,
        sha256=sha256(data),
        size_bytes=len(data),
        loaded_bytes=part.num_bytes,
        previous=previous,
        layers=tuple(
            LayerRecord(
                path=layer.path,
                scheme=layer.scheme,
                account=solved[layer.path].report if layer.path in solved else None,
                note=layer.note,
            )
            for layer in layers
        ),
        tuning=tuning,
    )
    return record, files


def finalize(
    plan: Plan,
    store: ObjectStore,
    preset_files: Mapping[str, bytes],
    parts: Sequence[Part],
    records: Mapping[int, CommittedRecord],
) -> Manifest:
    """Write the artifact's small files, verify every stored file, and commit the manifest.

    Args:
        store: opened at the run's root.
        preset_files: the source's files other than weights, as KerasHub saves them, by name.
            They are copied byte for byte, except for the dtype in config.json and task.json.
        records: of every part, by number.

    Raises:
        DamagedObjectError: a stored file differs from what was committed; resume repairs it.
    """
    json_files = {name: data for name, data in preset_files.items() if name.endswith(".json")}
    names = {**preset_files, **quantized_json(json_files, plan.policies)}
    names[INDEX_FILE] = weights_index(parts)
    files = {f"{ARTIFACT_PREFIX}{name}": data for name, data in names.items()}
    for key in sorted(files):
        store.create(key, files[key])
    return verify_and_seal(store, manifest_of(plan.digest, records, files, _provenance(plan)))


# A manifest says how much of the recipe was left out if it is more than a head or a pooler.
_NEARLY_ALL = 0.95


def _provenance(plan: Plan) -> dict[str, Any]:
    """Where the result comes from; nothing that differs between two executions of the plan."""
    tokens, share = plan.tokens, plan.share
    left_out = {"quantized_share": dataclasses.asdict(share)}
    return {
        **(left_out if share.of_recipe < _NEARLY_ALL else {}),
        **({"composed": _origins(plan)} if plan.composed else {}),
        "source_digest": plan.source_digest,
        "model": plan.model,
        "recipe": plan.recipe.to_dict(),
        "machine": plan.machine,
        "versions": plan.versions,
        "calibration": None
        if tokens is None
        else {
            "texts_sha256": tokens.fingerprint,
            "tokens_sha256": tokens.digest,
            "num_samples": tokens.num_samples,
            "sequence_length": tokens.sequence_length,
        },
    }


def _origins(plan: Plan) -> list[dict[str, Any]]:
    """The runs that a composition is made of, each with the parts that it gives.

    A run may give single layers of parts too, or these alone.
    """
    found: dict[str, dict[str, Any]] = {}

    def run(origin: PartOrigin | LayersOrigin) -> dict[str, Any]:
        named = {"recipe": origin.recipe, "manifest_sha256": origin.manifest_sha256, "parts": []}
        return found.setdefault(origin.manifest_sha256, named)

    for part, origin in enumerate(plan.composed):
        run(origin)["parts"].append(part)
        for some in origin.layers:
            run(some).setdefault("layers", []).extend(some.layers)
    return [found[digest] for digest in sorted(found)]
