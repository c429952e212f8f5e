"""Committing a run's parts, and finding out what is committed.

A part is committed once its record exists, which is written after the files that it names.
Committing the same bytes again succeeds and changes nothing; other bytes are a divergence, which no
retry can repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline.canonical import sha256
from pipeline.errors import (
    DamagedObjectError,
    DivergenceError,
    MissingObjectError,
    PlanMismatchError,
    StorageError,
)
from pipeline.run.records import (
    MANIFEST_KEY,
    RECORDS_PREFIX,
    CommittedRecord,
    FileDigest,
    Manifest,
    PartRecord,
    codes_key,
    file_key,
    record_key,
)
from pipeline.run.sums_records import SumsRecord
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import MAX_RECORD_BYTES, RecordError

QUARANTINE_PREFIX = "quarantine/"

RecordT = TypeVar("RecordT", PartRecord, SumsRecord)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """An object in storage that cannot be used; the problem names its full URL.

    Attributes:
        is_damaged: the object itself is bad, and must go before its part can be committed again;
            otherwise it is missing, or something that it depends on is.
    """

    key: str
    problem: str
    is_damaged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Generic[RecordT]):
    """What a run can resume from: usable records by part, and what cannot be used."""

    parts: dict[int, RecordT]
    findings: tuple[Finding, ...]


def commit_part(store: ObjectStore, record: CommittedRecord, files: Mapping[str, bytes]) -> None:
    """Write a part's files, then its record; idempotent, also with concurrent writers.

    Args:
        store: opened at the run's root.
        files: by storage key.

    Raises:
        RecordError: `record` does not describe `files`.
        DivergenceError: other bytes were committed for this part; nothing was overwritten.
    """
    given = {key: FileDigest.of(data) for key, data in files.items()}
    if given != record.files:
        sizes = {key: file.size_bytes for key, file in given.items()}
        raise RecordError(f"{record.key} does not describe what is to be committed: {sizes}")
    for key, content in (*files.items(), (record.key, record.to_json())):
        try:
            store.create(key, content)
        except FileExistsError as error:
            raise DivergenceError(
                f"{store.url(key)} holds other bytes than this execution made from the same plan; "
                "nothing was overwritten. Run all workers on one type of machine and check its "
                "memory, or start again in an empty run directory"
            ) from error


def committed_parts(
    store: ObjectStore,
    kind: type[RecordT],
    *,
    plan_digest: str,
    num_blocks: int,
    chained: bool,
    verify: bool,
) -> Committed[RecordT]:
    """Find out what a run can resume from; damaged objects are reported, and never used.

    Args:
        store: opened at the run's root.
        kind: of the run's records.
        num_blocks: blocks of the model.
        chained: each block's result depends on the block before, as with calibration, so that
            only an unbroken chain from block 0 on can be used.
        verify: read and hash every file; otherwise only check its size.
    """
    parts: dict[int, RecordT] = {}
    findings: list[Finding] = []
    present = set(store.list(RECORDS_PREFIX))
    # Digest of the record of the block before; None if that block cannot be used.
    previous: str | None = ""
    for part in range(num_blocks + 1):
        in_chain = chained and part > 0
        found: RecordT | list[Finding] = []
        if record_key(part) in present:
            found = _examine(store, kind, part, plan_digest, previous if in_chain else "", verify)
        if isinstance(found, list):
            findings += found
        else:
            parts[part] = found
        if in_chain:
            previous = None if isinstance(found, list) else found.record_sha256
    return Committed(parts=parts, findings=tuple(findings))


def committed_file(store: ObjectStore, part: int) -> bytes:
    """Read a committed part's file of weights.

    Raises:
        DamagedObjectError: it is not as its record says, or there is no record.
    """
    data = _committed(store, part, file_key(part))
    assert data is not None
    return data


def committed_codes(store: ObjectStore, part: int) -> bytes | None:
    """Read a committed part's file of codes; None if it has none. Errors as `committed_file`."""
    return _committed(store, part, codes_key(part))


def _committed(store: ObjectStore, part: int, key: str) -> bytes | None:
    try:
        file = PartRecord.read(store, record_key(part)).files.get(key)
        return None if file is None else store.get(key, sha256=file.sha256, size=file.size_bytes)
    except MissingObjectError as error:
        raise DamagedObjectError(f"part {part} is no longer committed: {error}") from error


def quarantine(store: ObjectStore, findings: Sequence[Finding]) -> None:
    """Move damaged objects aside, so that their parts can be committed again.

    The caller must hold the run's lease.
    """
    for finding in findings:
        if finding.is_damaged and store.exists(finding.key):
            data = store.get(finding.key)
            store.put(f"{QUARANTINE_PREFIX}{finding.key}.{sha256(data)[:16]}", data)
            store.delete(finding.key)


def damaged_files(store: ObjectStore, manifest: Manifest) -> tuple[Finding, ...]:
    """Read and hash everything that a manifest names; returns what is not as it says."""
    damaged = []
    for key, file in sorted(manifest.files.items()):
        try:
            store.verify(key, sha256=file.sha256, size=file.size_bytes)
        except (DamagedObjectError, MissingObjectError) as error:
            damaged.append(_finding(key, error))
    for key, digest in sorted(manifest.records.items()):
        try:
            store.get(key, sha256=digest, at_most=MAX_RECORD_BYTES)
        except (DamagedObjectError, MissingObjectError) as error:
            damaged.append(_finding(key, error))
    return tuple(damaged)


def verify_and_seal(store: ObjectStore, manifest: Manifest) -> Manifest:
    """Read everything that a manifest names once more, and commit it (see `commit_manifest`).

    Raises:
        DamagedObjectError: a stored file differs from what was committed; resume repairs it.
    """
    damaged = damaged_files(store, manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} committed objects are damaged, the first: {damaged[0].problem}; "
            "resume the run to make them again"
        )
    return commit_manifest(store, manifest)


def commit_manifest(store: ObjectStore, manifest: Manifest) -> Manifest:
    """Mark a run as finished; returns the manifest that counts: the first that was written.

    Check `damaged_files` first: readers trust what a manifest names.

    Raises:
        PlanMismatchError: the run's directory holds the result of another plan.
        DivergenceError: it holds other files for the same plan.
        DamagedObjectError: the existing manifest cannot be read.
    """
    try:
        store.create(manifest.key, manifest.to_json())
    except FileExistsError:
        committed = read_manifest(store)
        url = store.url(manifest.key)
        if committed.plan_digest != manifest.plan_digest:
            raise PlanMismatchError(
                f"{url} belongs to plan {committed.plan_digest}, not to {manifest.plan_digest}; "
                "choose another run directory"
            ) from None
        if (committed.files, committed.records) != (manifest.files, manifest.records):
            raise DivergenceError(
                f"{url} names other files than this execution of the same plan made; nothing was "
                "overwritten. Run all workers on one type of machine, and check its memory"
            ) from None
        return committed
    return manifest


def read_manifest(store: ObjectStore) -> Manifest:
    """Read a finished run's manifest.

    Raises:
        MissingObjectError: the run is not finished.
        DamagedObjectError: it cannot be read.
    """
    return Manifest.read(store, MANIFEST_KEY)


def _examine(
    store: ObjectStore,
    kind: type[RecordT],
    part: int,
    plan_digest: str,
    previous: str | None,
    verify: bool,
) -> RecordT | list[Finding]:
    """A part's record, or why it cannot be used, or each of its files that cannot."""
    key = record_key(part)
    url = store.url(key)
    if previous is None:
        problem = f"{url} follows a block that is not committed"
        return [Finding(key=key, problem=problem, is_damaged=False)]
    try:
        record = kind.read(store, key)
        if record.part != part:
            raise DamagedObjectError(f"{url} is the record of part {record.part}")
        if record.plan_digest != plan_digest:
            raise DamagedObjectError(
                f"{url} belongs to plan {record.plan_digest}, not to {plan_digest}"
            )
        if record.previous != previous:
            raise DamagedObjectError(f"{url} follows another record than the one before it")
    except (DamagedObjectError, MissingObjectError) as error:
        return [_finding(key, error)]
    # All of them: one that stays damaged would meet other bytes when the part is committed again.
    damaged = []
    for name, file in record.files.items():
        try:
            if verify:
                store.verify(name, sha256=file.sha256, size=file.size_bytes)
            elif (size := store.size(name)) != file.size_bytes:
                raise DamagedObjectError(
                    f"{store.url(name)} is damaged: it has {size} bytes instead of "
                    f"{file.size_bytes}"
                )
        except (DamagedObjectError, MissingObjectError) as error:
            damaged.append(_finding(name, error))
    return damaged or record


def _finding(key: str, error: StorageError) -> Finding:
    return Finding(key=key, problem=str(error), is_damaged=isinstance(error, DamagedObjectError))
