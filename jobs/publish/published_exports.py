"""Exports that are published with a release: where they lie, and that they are intact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import ConfigDict

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.export.code_formats import ExportFormat
from pipeline.export.description import MadeExport
from pipeline.export.manifest import EXPORT_KEY, ExportManifest, verify_export
from pipeline.run.records import Digest, NumBytes
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import STRICT


@dataclass(frozen=True, kw_only=True)
class PublishedExport:
    """A checkpoint for other runtimes, of a release's artifact.

    Attributes:
        folder: key, below the catalog's root, of the folder with its files.
        manifest_sha256: of export.json in it, which names every file with its digest.
        size_bytes: of all files but that one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: ExportFormat
    folder: str
    manifest_sha256: Digest
    size_bytes: NumBytes

    @classmethod
    def of(cls, root: ObjectStore, made: MadeExport) -> Self:
        """A finished export below a catalog's root."""
        return cls(
            format=made.description.format,
            folder=made.url.removeprefix(f"{root.root_url}/"),
            manifest_sha256=made.manifest.record_sha256,
            size_bytes=made.manifest.num_bytes,
        )

    @property
    def key_in_run(self) -> str:
        """Its folder below the run's own."""
        return self.folder.split("/", 2)[2]


def published_manifest(root: ObjectStore, export: PublishedExport) -> ExportManifest:
    """The manifest that was published.

    Raises:
        DamagedObjectError: it is missing, damaged, or another one.
    """
    store = open_store(f"{root.root_url}/{export.folder}")
    try:
        manifest = ExportManifest.read(store, EXPORT_KEY)
    except MissingObjectError as error:
        raise DamagedObjectError(f"{error}; an export of the release is gone") from None
    if manifest.record_sha256 != export.manifest_sha256:
        raise DamagedObjectError(f"{store.url(EXPORT_KEY)} is not the one that was published")
    return manifest


def verify_published(root: ObjectStore, export: PublishedExport) -> ExportManifest:
    """Read and hash every file of a published export.

    Raises:
        DamagedObjectError: one is missing, or not what was published.
    """
    manifest = published_manifest(root, export)
    verify_export(open_store(f"{root.root_url}/{export.folder}"), manifest)
    return manifest
