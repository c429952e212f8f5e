"""The end of a run: the artifact's small files, a last look at everything, and the manifest.

A part's file and record, put together of what was solved and what stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from pipeline.artifact.parts import INDEX_FILE, Part, encode_part, weights_index
from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError
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
from pipeline.worker.model_state import ModelState


def seal(
    plan: Plan, model: ModelState, store: ObjectStore, records: Mapping[int, PartRecord]
) -> Manifest:
    """Write what a preset needs beside its weights, check all files as stored, declare it done.

    Raises:
        DamagedObjectError: a file in storage is not as it was committed; resume solves it again.
    """
    files = small_files(plan, model)
    for key in sorted(files):
        store.create(key, files[key])
    manifest = manifest_of(plan.digest, dict(records), files, provenance(plan))
    damaged = damaged_files(store, manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} committed objects are damaged, the first: {damaged[0].problem}; "
            "resume the run, which makes them again"
        )
    return commit_manifest(store, manifest)


def small_files(plan: Plan, model: ModelState) -> dict[str, bytes]:
    """The artifact's files other than weights, by storage key.

    JSON and tokenizer are the source's own, byte for byte; only the dtype is another.
    """
    found = dict(model.preset_files())
    json_files = {name: data for name, data in found.items() if name.endswith(".json")}
    found |= quantized_json(json_files, plan.policies)
    found[INDEX_FILE] = weights_index(model.parts)
    return {f"{ARTIFACT_PREFIX}{name}": data for name, data in found.items()}


def provenance(plan: Plan) -> dict[str, Any]:
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


def make_part(
    plan: Plan,
    file: Part,
    part: int,
    previous: str,
    values: Values,
    results: Mapping[str, SolvedLayer],
) -> tuple[PartRecord, bytes]:
    """The record of a part, and its file's bytes.

    Args:
        file: what the part's file holds.
        previous: digest of the record of the block before; "" where there is none.
        values: the source's arrays, by variable path.
        results: the solved layers, by path.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path, result in results.items():
        arrays |= file.layer_values(path, result.variables)
    for stored in file.variables:
        if stored.name_path not in arrays:
            arrays[stored.name_path] = values[str(stored.variable.path)]
    data = encode_part(file, arrays)
    record = PartRecord(
        part=part,
        plan_digest=plan.digest,
        file=file_key(part),
        sha256=sha256(data),
        size_bytes=len(data),
        loaded_bytes=file.num_bytes,
        previous=previous,
        layers=tuple(
            LayerRecord(
                path=layer.path,
                scheme=layer.scheme,
                account=results[layer.path].report if layer.path in results else None,
                note=layer.note,
            )
            for layer in plan.parts[part].layers
        ),
    )
    return record, data
