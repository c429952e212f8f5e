"""The end of a run: the artifact's small files, a last look at everything, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.artifact.parts import INDEX_FILE, weights_index
from pipeline.artifact.preset_json import quantized_json
from pipeline.commits import commit_manifest, damaged_files
from pipeline.compute.model_state import ModelState
from pipeline.errors import DamagedObjectError
from pipeline.plan import Plan
from pipeline.records import ARTIFACT_PREFIX, Manifest, PartRecord, manifest_of
from pipeline.storage.object_store import ObjectStore


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
        "recipe": plan.recipe,
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
