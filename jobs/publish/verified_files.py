"""Which versions of an artifact's files were read and found intact.

A file that has another version in the store since then is read and hashed again; others are not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from pydantic import ConfigDict

from jobs.catalog.request import checked_id, run_store
from jobs.publish.published_exports import PublishedExport, published_manifest
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.export.manifest import EXPORT_KEY, ExportManifest
from pipeline.export.settings import EXPORTS_PREFIX
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord


@dataclass(frozen=True, kw_only=True)
class VerifiedFile:
    """One file's version when it was verified, and its digest."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    token: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class VerifiedFiles(StoredRecord):
    """All files of one artifact and its published exports: what their manifests name, and those."""

    run_id: str
    manifest_sha256: str
    files: dict[str, VerifiedFile]

    @classmethod
    def of(
        cls,
        run_id: str,
        manifest: Manifest,
        versions: Mapping[str, Version],
        exports: Mapping[PublishedExport, ExportManifest] = MappingProxyType({}),
    ) -> VerifiedFiles:
        """The manifest's files as verified.

        Args:
            versions: looked up before the files were read; files without one count as not read.
            exports: with their manifests.
        """
        known = {key: (entry.sha256, entry.size_bytes) for key, entry in manifest.files.items()}
        known[MANIFEST_KEY] = (manifest.record_sha256, len(manifest.to_json()))
        for export, its_own in exports.items():
            known |= _export_files(export, its_own)
        files = {}
        for key, (digest, size_bytes) in sorted(known.items()):
            token = versions[key].token if key in versions else ""
            files[key] = VerifiedFile(token=token, sha256=digest, size_bytes=size_bytes)
        return cls(run_id=run_id, manifest_sha256=manifest.record_sha256, files=files)

    def with_exports(self, root: ObjectStore, exports: Sequence[PublishedExport]) -> VerifiedFiles:
        """These files with exactly those of some exports; new ones count as not read.

        Raises:
            DamagedObjectError: an export's manifest is not what was published.
        """
        folders = tuple(f"{export.key_in_run}/" for export in exports)
        files = {
            key: file
            for key, file in self.files.items()
            if not key.startswith(EXPORTS_PREFIX) or key.startswith(folders)
        }
        for export in exports:
            known = files.get(f"{export.key_in_run}/{EXPORT_KEY}")
            if known is not None and known.sha256 == export.manifest_sha256:
                continue
            for key, (digest, size) in _export_files(
                export, published_manifest(root, export)
            ).items():
                files[key] = VerifiedFile(token="", sha256=digest, size_bytes=size)
        return dataclasses.replace(self, files=files)

    def save(self, root: ObjectStore) -> None:
        """Write the record, over an older one."""
        root.put(verified_files_key(self.run_id), self.to_json())


def _export_files(export: PublishedExport, manifest: ExportManifest) -> dict[str, tuple[str, int]]:
    """Digest and size of an export's files, by key below the run's root."""
    folder = export.key_in_run
    found = {f"{folder}/{k}": (one.sha256, one.size_bytes) for k, one in manifest.files.items()}
    found[f"{folder}/{EXPORT_KEY}"] = (manifest.record_sha256, len(manifest.to_json()))
    return found


@dataclass(frozen=True, kw_only=True)
class ArtifactCheck:
    """The result of checking an artifact.

    Attributes:
        problem: in words; "" for an intact artifact.
        bytes_read: of the files that were read again.
        verified: to be saved; None unless files were read again and all are intact.
    """

    problem: str = ""
    bytes_read: int = 0
    verified: VerifiedFiles | None = field(default=None, repr=False)


def check_artifact(
    root: ObjectStore,
    run_id: str,
    manifest_sha256: str,
    versions: Mapping[str, Version] | None = None,
    *,
    exports: Sequence[PublishedExport] = (),
) -> ArtifactCheck:
    """Check that a published artifact is intact, reading only what was written since last time.

    Args:
        manifest_sha256: of the manifest that was published.
        versions: of the run's files, if they are listed already.
        exports: that were published with it.
    """
    versions = run_store(root, run_id).versions() if versions is None else versions
    if MANIFEST_KEY not in versions:
        return ArtifactCheck(problem=_problem("missing", [MANIFEST_KEY]))
    last: VerifiedFiles | None = None
    with contextlib.suppress(MissingObjectError, DamagedObjectError):
        last = VerifiedFiles.read(root, verified_files_key(run_id))
    if last is None or last.manifest_sha256 != manifest_sha256:
        try:
            manifest = read_manifest(run_store(root, run_id))
        except (DamagedObjectError, MissingObjectError):
            return ArtifactCheck(problem=_problem("damaged", [MANIFEST_KEY]))
        last = VerifiedFiles.of(run_id, manifest, {})
        if last.manifest_sha256 != manifest_sha256:
            return ArtifactCheck(problem=_problem("damaged", [MANIFEST_KEY]))
    try:
        last = last.with_exports(root, exports)
    except DamagedObjectError as error:
        return ArtifactCheck(problem=f"export damaged: {error}")
    missing = [key for key in last.files if key not in versions]
    if missing:
        return ArtifactCheck(problem=_problem("missing", missing))
    changed = [key for key, file in last.files.items() if versions[key].token != file.token]
    damaged = []
    for key in changed:
        expected = last.files[key]
        try:
            run_store(root, run_id).verify(key, sha256=expected.sha256, size=expected.size_bytes)
        except (DamagedObjectError, MissingObjectError):
            damaged.append(key)
    verified = None
    if changed and not damaged:
        now = {
            key: dataclasses.replace(last.files[key], token=versions[key].token) for key in changed
        }
        verified = dataclasses.replace(last, files=last.files | now)
    return ArtifactCheck(
        problem=_problem("damaged", damaged),
        bytes_read=sum(versions[key].size_bytes for key in changed),
        verified=verified,
    )


def _problem(word: str, keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"artifact {word}: {keys[0]}{more}" if keys else ""


def verified_files_key(run_id: str) -> str:
    """Where a run's record lies, below a catalog's root."""
    return f"seen/{checked_id(run_id)}.json"
