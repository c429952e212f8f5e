"""`quantfleet verify`: check that a finished result is intact, and that stock KerasHub loads it."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from jobs.logging import log_event, print_json, status
from jobs.reachable import finished_manifest, reachable
from pipeline.artifact.loading import load_hints
from pipeline.errors import ArtifactError, DamagedObjectError
from pipeline.export.manifest import find_exports, verify_export
from pipeline.plain.plan import MODEL_KEY, is_plain
from pipeline.run.commits import damaged_files
from pipeline.run.records import (
    ARTIFACT_PREFIX,
    CODES_PREFIX,
    MANIFEST_KEY,
    Manifest,
    codes_key,
)
from pipeline.storage.object_store import ObjectStore, open_store


def verify_run(output_url: str, *, stock: bool, as_json: bool) -> None:
    """Read and hash everything that manifest and exports name, then load it with stock KerasHub.

    Raises:
        DamagedObjectError: the run is not finished, or a file differs from its manifest.
        ArtifactError: stock KerasHub does not load it, or its outputs are not finite.
    """
    store = reachable(output_url)
    manifest = finished_manifest(store, output_url)
    with status("reading and hashing every file"):
        damaged = damaged_files(store, manifest)
    if damaged:
        for finding in damaged:
            log_event("damaged", finding.problem, level=logging.ERROR)
        raise DamagedObjectError(
            f"{len(damaged)} of {len(manifest.files) + len(manifest.records)} objects are damaged; "
            "quantize again into an empty folder"
        )
    with status("reading and hashing every export"):
        exports = _verify_exports(store, manifest)
    num_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    codes = [entry for key, entry in manifest.files.items() if key.startswith(CODES_PREFIX)]
    load = _load_plain if is_plain(manifest) else _load
    loaded = load(store, manifest) if stock else None
    found = {
        "files": len(manifest.files),
        "bytes": num_bytes,
        "codes_bytes": sum(entry.size_bytes for entry in codes),
        "plan_digest": manifest.plan_digest,
        "exports": exports,
        "stock": loaded,
    }
    text = (
        f"{store.url(MANIFEST_KEY)}: {len(manifest.files)} files, {num_bytes:,} bytes, all match "
        "the manifest"
    )
    if codes:
        text += (
            f"; {found['codes_bytes']:,} bytes of these are codes of experts, which stock KerasHub "
            "loads as float"
        )
    if exports:
        text += f"; so do those of {', '.join(exports)}"
    if as_json:
        print_json(found)
    else:
        log_event("verified", "; ".join(filter(None, (text, loaded))), found)
        for hint in () if is_plain(manifest) else load_hints(store):
            log_event("loadable", hint)


def _verify_exports(store: ObjectStore, manifest: Manifest) -> list[str]:
    """Read and hash the exports below a run; returns their folders.

    Raises:
        DamagedObjectError: a file differs from its export.json, or an export is of another result.
    """
    found = find_exports(store)
    for folder, export in found.items():
        if export.request.source_manifest_sha256 != manifest.record_sha256:
            raise DamagedObjectError(
                f"{store.url(folder)}: exported from another result than is here now; delete the "
                "folder, and export again"
            )
        verify_export(open_store(store.url(folder)), export)
    return list(found)


def _load(store: ObjectStore, manifest: Manifest) -> str:
    # Imported here: JAX and Keras are slow to load. Without a choice Keras takes TensorFlow.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from pipeline.artifact.verification import ask_stock, example_inputs, inspect_artifact

    with tempfile.TemporaryDirectory(prefix="quantfleet-verify-") as folder:
        with status("downloading the artifact"):
            for key, entry in sorted(manifest.files.items()):
                if key.startswith(ARTIFACT_PREFIX):
                    path = Path(folder, key.removeprefix(ARTIFACT_PREFIX))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(store.get(key, sha256=entry.sha256, size=entry.size_bytes))

        def codes(part: int) -> bytes | None:
            entry = manifest.files.get(codes_key(part))
            if entry is None:
                return None
            return store.get(codes_key(part), sha256=entry.sha256, size=entry.size_bytes)

        with status("checking its files"):
            inspect_artifact(Path(folder), codes)
        with status("loading it with stock KerasHub"):
            answer = ask_stock([folder], [example_inputs(Path(folder))])
    if not np.isfinite(answer.outputs[0]).all():
        raise ArtifactError(
            f"{store.url(ARTIFACT_PREFIX)}: loads, but its outputs are NaN or infinite"
        )
    shape = " × ".join(map(str, answer.outputs[0].shape))
    return f"stock KerasHub {answer.keras_hub} on {answer.backend} loads it; output shape {shape}"


def _load_plain(store: ObjectStore, manifest: Manifest) -> str:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from pipeline.artifact.verification import ask_stock_keras
    from pipeline.plain.keras_file import load_model

    entry, url = manifest.files[MODEL_KEY], store.url(MODEL_KEY)
    with tempfile.TemporaryDirectory(prefix="quantfleet-verify-") as folder:
        data = store.get(MODEL_KEY, sha256=entry.sha256, size=entry.size_bytes)
        with status("checking the file"):
            load_model(data, url)
        path = Path(folder, MODEL_KEY)
        path.write_bytes(data)
        with status("loading it with stock Keras"):
            answer = ask_stock_keras(path)
    if not answer["finite"]:
        raise ArtifactError(f"{url}: loads, but its outputs are NaN or infinite")
    shapes = ", ".join(" × ".join(map(str, shape)) for shape in answer["shapes"])
    return f"stock Keras {answer['keras']} on {answer['backend']} loads it; output shape {shapes}"
