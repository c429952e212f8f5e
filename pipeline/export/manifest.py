"""What is stored of a finished export, and how it is checked.

Reading this needs neither JAX nor Keras, as drivers and `quantfleet gc` have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.export.kernels import ExportedTensor
from pipeline.export.settings import EXPORTS_PREFIX
from pipeline.run.records import Digest, FileDigest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

EXPORT_KEY = "export.json"
PROGRESS_PREFIX = "export-"
REQUEST_KEY = f"{PROGRESS_PREFIX}request.json"
"""What an unfinished export is of, and how; the other keys of progress name its finished parts."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest(StoredRecord):
    """What a folder is exported from, and how: everything that decides its bytes.

    Attributes:
        source_manifest_sha256: of the run's manifest.json.
        config_sha256: of config.json and of the small files.
    """

    source_manifest_sha256: Digest
    format: str
    dtype: str
    config_sha256: Digest


@dataclass(frozen=True, kw_only=True)
class ExportManifest(StoredRecord):
    """A finished export: every file of it by name, and what became of every matrix."""

    key: ClassVar[str] = EXPORT_KEY

    request: ExportRequest
    files: dict[str, FileDigest]
    tensors: tuple[ExportedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Of all files but this one."""
        return sum(file.size_bytes for file in self.files.values())


def find_exports(run: ObjectStore) -> dict[str, ExportManifest]:
    """The finished exports below a run, by the key of their folder.

    Args:
        run: opened at the run's root.

    Raises:
        DamagedObjectError: an export.json cannot be read.
    """
    keys = (key for key in run.list(EXPORTS_PREFIX) if key.endswith(f"/{EXPORT_KEY}"))
    return {key.removesuffix(f"/{EXPORT_KEY}"): ExportManifest.read(run, key) for key in keys}


def verify_export(store: ObjectStore, manifest: ExportManifest) -> None:
    """Read and hash every file of an export.

    Args:
        store: opened at the export's folder.

    Raises:
        DamagedObjectError: one is missing or differs.
    """
    for name, file in sorted(manifest.files.items()):
        try:
            store.verify(name, sha256=file.sha256, size=file.size_bytes)
        except (DamagedObjectError, MissingObjectError) as error:
            raise DamagedObjectError(f"{error}; delete the folder, and export again") from None


def discard(store: ObjectStore, request: ExportRequest) -> None:
    """Delete a damaged export, so that it can be written again to the same folder.

    The folder stays the request's all the while, so an interruption leaves nothing unknown. What
    it was said to be before may be damaged too.
    """
    store.put(REQUEST_KEY, request.to_json())
    # No reader may take the rest for a finished export.
    store.delete(EXPORT_KEY)
    for key in store.list():
        if key != REQUEST_KEY:
            store.delete(key)


def forget_progress(store: ObjectStore) -> None:
    """Delete what a finished export was gone on from."""
    for key in store.list(PROGRESS_PREFIX):
        store.delete(key)
