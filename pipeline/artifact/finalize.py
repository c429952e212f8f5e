"""What a worker writes into the artifact: each part's file and record, and the end of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from pipeline.artifact.parts import Part, encode_part, weights_index
from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError
from pipeline.model.preset import INDEX_FILE
from pipeline.model.quantized_config import quantized_json
from pipeline.plan import Plan
from pipeline.run.commits import commit_manifest, damaged_files
from pipeline.run.records import (
    ARTIFACT_PREFIX,
    LayerRecord,
    Manifest,
    PartRecord,
    file_key,
    manifest_of,
)
from pipeline.run.worker_api import SolvedLayer, Values
from pipeline.storage.object_store import ObjectStore
from quantizer.schemes import Float8Scheme


def encode_solved_part(
    plan: Plan,
    part: Part,
    previous: str,
    values: Values,
    solved: Mapping[str, SolvedLayer],
) -> tuple[PartRecord, bytes]:
    """A part's record, and the bytes of its file.

    Args:
        previous: digest of the record of the block before; "" where there is none.
        values: the source's arrays, by variable path.
        solved: the quantized layers, by path. All other variables keep the source's values.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path, layer in solved.items():
        arrays |= part.layer_values(path, layer.variables)
    for stored in part.variables:
        if stored.name_path not in arrays:
            arrays[stored.name_path] = values[str(stored.variable.path)]
    data = encode_part(part, arrays, compressed_layers=_compressed_layers(plan))
    record = PartRecord(
        part=part.number,
        plan_digest=plan.digest,
        file=file_key(part.number),
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
            for layer in plan.parts[part.number].layers
        ),
    )
    return record, data


def finalize(
    plan: Plan,
    store: ObjectStore,
    preset_files: Mapping[str, bytes],
    parts: Sequence[Part],
    records: Mapping[int, PartRecord],
) -> Manifest:
    """Write the artifact's small files, verify every stored file, and commit the manifest.

    Args:
        store: opened at the run's root.
        preset_files: the source's files other than weights, as KerasHub saves them, by name.
            They are copied byte for byte, except for the dtype in config.json and task.json.
        parts: all of the artifact's parts.
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
    manifest = manifest_of(plan.digest, dict(records), files, _provenance(plan))
    damaged = damaged_files(store, manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} committed objects are damaged, the first: {damaged[0].problem}; "
            "resume the run to make them again"
        )
    return commit_manifest(store, manifest)


def _compressed_layers(plan: Plan) -> frozenset[str]:
    """Paths of the layers whose kernels are compressed at rest: float8's, from format 2 on."""
    if plan.weights_format == 1:
        return frozenset()
    layers = [layer for part in plan.parts for layer in part.layers]
    return frozenset(layer.path for layer in layers if isinstance(layer.scheme, Float8Scheme))


def _provenance(plan: Plan) -> dict[str, Any]:
    """Where the result comes from; nothing that differs between two executions of the plan."""
    tokens = plan.tokens
    return {
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
