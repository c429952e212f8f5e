"""Write a planned checkpoint to a store: one part in memory at a time, each file committed once.

Data first, export.json last: what it names is complete. Equal artifacts and options give equal
bytes, so an interrupted export goes on where it stopped, and two at once do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from pipeline.artifact.safetensors_file import safetensors_bytes
from pipeline.canonical import canonical_json, digest_of, sha256
from pipeline.errors import MissingObjectError, ObjectExistsError, PlanMismatchError
from pipeline.export.checkpoint import Checkpoint
from pipeline.export.manifest import (
    EXPORT_KEY,
    PROGRESS_PREFIX,
    REQUEST_KEY,
    ExportManifest,
    ExportRequest,
    verify_export,
)
from pipeline.run.commits import committed_codes, committed_file
from pipeline.run.records import FileDigest, Manifest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord

Report = Callable[[int, int], None]
"""Called after each part with its number and the number of parts."""


@dataclass(frozen=True, kw_only=True)
class _PartRecord(StoredRecord):
    """One written file of tensors: their bytes by name."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: Annotated[int, Field(ge=0)]
    file: FileDigest
    tensors: dict[str, int]


def write_checkpoint(
    checkpoint: Checkpoint,
    run: ObjectStore,
    manifest: Manifest,
    store: ObjectStore,
    report: Report = lambda _number, _of: None,
) -> ExportManifest:
    """Export a finished run, from wherever an earlier attempt stopped.

    Nothing is deleted, since workers may not: `forget_progress` removes what is not needed then.

    Args:
        run: opened at the run's root; `manifest` is its own.
        store: opened at the folder to write.

    Raises:
        PlanMismatchError: the folder holds something else.
        DamagedObjectError: a file of the run or of the export is not what was written.
        ExportError: values that the format cannot hold.
    """
    small = _small_files(checkpoint)
    request = export_request(checkpoint, manifest)
    finished = _claim(store, request)
    if finished is not None:
        verify_export(store, finished)
        return finished
    files: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(len(checkpoint.parts)):
        file = checkpoint.file(number)
        record = _committed(store, number, file) or _write_part(checkpoint, run, store, number)
        files[file] = record.file
        weight_map |= dict.fromkeys(record.tensors, file)
        total_bytes += sum(record.tensors.values())
        report(number, len(checkpoint.parts))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    small["model.safetensors.index.json"] = canonical_json(index)
    for name, data in sorted(small.items()):
        store.create(name, data)
        files[name] = FileDigest.of(data)
    made = ExportManifest(request=request, files=files, tensors=checkpoint.report())
    verify_export(store, made)
    store.create(EXPORT_KEY, made.to_json())
    return made


def _small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """All files but tensors and their index."""
    config = {"config.json": canonical_json(checkpoint.config_json())}
    return checkpoint.config.small_files() | config


def export_request(checkpoint: Checkpoint, manifest: Manifest) -> ExportRequest:
    """Everything that decides the bytes of an export.

    Args:
        manifest: of the run whose artifact is exported.
    """
    small = _small_files(checkpoint)
    return ExportRequest(
        source_manifest_sha256=manifest.record_sha256,
        format=checkpoint.format,
        dtype=str(checkpoint.dtype),
        config_sha256=digest_of({name: sha256(data) for name, data in small.items()}),
    )


def _claim(store: ObjectStore, request: ExportRequest) -> ExportManifest | None:
    """Make the folder this export's; returns the manifest if it is finished."""
    if store.exists(EXPORT_KEY):
        found = ExportManifest.read(store, EXPORT_KEY)
        if found.request != request:
            raise _other_export(store, EXPORT_KEY)
        return found
    if not store.exists(REQUEST_KEY):
        foreign = store.list()
        if foreign:
            raise PlanMismatchError(
                f"{store.url(foreign[0])} is there already, and no export; name an empty folder "
                "with --to"
            )
    try:
        store.create(REQUEST_KEY, request.to_json())
    except ObjectExistsError:
        raise _other_export(store, REQUEST_KEY) from None
    return None


def _other_export(store: ObjectStore, key: str) -> PlanMismatchError:
    return PlanMismatchError(
        f"{store.url(key)} is of an export of another run, or with other options; delete the "
        "folder, or name another one with quantfleet export --to"
    )


def _part_key(number: int) -> str:
    return f"{PROGRESS_PREFIX}part-{number:05d}.json"


def _committed(store: ObjectStore, number: int, file: str) -> _PartRecord | None:
    """The record of a part that was written, and is intact."""
    try:
        record = _PartRecord.read(store, _part_key(number))
        store.verify(file, sha256=record.file.sha256, size=record.file.size_bytes)
    except MissingObjectError:
        return None
    return record


def _write_part(
    checkpoint: Checkpoint, run: ObjectStore, store: ObjectStore, number: int
) -> _PartRecord:
    tensors = checkpoint.encode(number, committed_file(run, number), committed_codes(run, number))
    data = safetensors_bytes(tensors)
    sizes = {name: int(array.nbytes) for name, array in sorted(tensors.items())}
    record = _PartRecord(number=number, file=FileDigest.of(data), tensors=sizes)
    store.create(checkpoint.file(number), data)
    store.create(_part_key(number), record.to_json())
    return record
