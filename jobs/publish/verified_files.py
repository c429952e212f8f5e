"""Which versions of an artifact's files were read and found whole.

A file whose version in the store is another one since is read and hashed again; the others are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from jobs.catalog.request import checked_id, run_store
from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord

SEEN_PREFIX = "seen/"


@dataclass(frozen=True, kw_only=True)
class SeenFile:
    """One file's version when it was found whole, and what its bytes were."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    token: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Seen(StoredRecord):
    """Those of one artifact: all that its manifest names, and the manifest."""

    run_id: str
    manifest_sha256: str
    files: dict[str, SeenFile]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at an artifact found.

    Attributes:
        missing, damaged: keys below the run's root.
        reread: keys that were read again.
        bytes_read: in doing so.
        seen: to be saved where something was read again and found whole; else None.
    """

    missing: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    reread: tuple[str, ...] = ()
    bytes_read: int = 0
    seen: Seen | None = field(default=None, repr=False)

    @property
    def problem(self) -> str:
        """In words; "" where the artifact is whole."""
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
            return f"artifact missing: {self.missing[0]}{more}"
        if self.damaged:
            more = f" and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
            return f"artifact damaged: {self.damaged[0]}{more}"
        return ""


def note_whole(
    root: ObjectStore, run_id: str, manifest: Manifest, versions: Mapping[str, Version]
) -> None:
    """Note that an artifact was read and found whole.

    Args:
        versions: of its files, looked up before they were read.
    """
    save_seen(root, _seen(run_id, manifest, versions))


def save_seen(root: ObjectStore, seen: Seen) -> None:
    """Write it, over an older one."""
    root.put(seen_key(seen.run_id), seen.to_json())


def look(
    root: ObjectStore,
    run_id: str,
    manifest_sha256: str,
    versions: Mapping[str, Version] | None = None,
) -> Look:
    """Find out whether a published artifact is still whole, reading only what was written since.

    Args:
        manifest_sha256: of the manifest that was published.
        versions: of the run's files, where they were listed already.
    """
    store = run_store(root, run_id)
    versions = store.versions() if versions is None else versions
    if MANIFEST_KEY not in versions:
        return Look(missing=(MANIFEST_KEY,))
    seen = _saved(root, run_id)
    if seen is None or seen.manifest_sha256 != manifest_sha256:
        try:
            manifest = read_manifest(store)
        except (DamagedObjectError, MissingObjectError):
            return Look(damaged=(MANIFEST_KEY,))
        # Of nothing is it known that it was whole.
        seen = _seen(run_id, manifest, {})
        if seen.manifest_sha256 != manifest_sha256:
            return Look(damaged=(MANIFEST_KEY,))
    missing = tuple(key for key in seen.files if key not in versions)
    if missing:
        return Look(missing=missing)
    reread = [key for key, file in seen.files.items() if versions[key].token != file.token]
    damaged = []
    for key in reread:
        expected = seen.files[key]
        try:
            store.verify(key, sha256=expected.sha256, size=expected.size_bytes)
        except (DamagedObjectError, MissingObjectError):
            damaged.append(key)
    fresh = {
        key: SeenFile(token=versions[key].token, sha256=file.sha256, size_bytes=file.size_bytes)
        for key, file in seen.files.items()
    }
    return Look(
        damaged=tuple(damaged),
        reread=tuple(reread),
        bytes_read=sum(versions[key].size_bytes for key in reread),
        seen=Seen(run_id=run_id, manifest_sha256=manifest_sha256, files=fresh)
        if reread and not damaged
        else None,
    )


def _seen(run_id: str, manifest: Manifest, versions: Mapping[str, Version]) -> Seen:
    written = manifest.to_json()
    known = {key: (entry.sha256, entry.size_bytes) for key, entry in manifest.files.items()}
    known[MANIFEST_KEY] = (sha256(written), len(written))
    return Seen(
        run_id=run_id,
        manifest_sha256=sha256(written),
        files={
            key: SeenFile(
                token=versions[key].token if key in versions else "",
                sha256=digest,
                size_bytes=size_bytes,
            )
            for key, (digest, size_bytes) in sorted(known.items())
        },
    )


def _saved(root: ObjectStore, run_id: str) -> Seen | None:
    try:
        return Seen.read(root, seen_key(run_id))
    except (MissingObjectError, DamagedObjectError):
        return None


def seen_key(run_id: str) -> str:
    """Below a catalog's root."""
    return f"{SEEN_PREFIX}{checked_id(run_id)}.json"
