"""What a run leaves behind besides weights: a record for each file of them, and the manifest.

Part 0 is everything outside the blocks, part i + 1 is block i, and part p is the artifact's file
`model_{p:05d}.weights.h5`. Nothing here differs from one execution to the next, no time and no
host, so that two executions of one plan write the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, StringConstraints

from pipeline.canonical import sha256
from pipeline.recipe.recipe import SchemeField
from pipeline.storage.record import STRICT, RecordError, StoredRecord

MANIFEST_KEY = "manifest.json"
ARTIFACT_PREFIX = "artifact/"
RECORDS_PREFIX = "records/"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
NumBytes = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        path: Keras' path of the layer.
        scheme: how it was quantized; None for a layer left in float.
        account: what the solver reports, as plain JSON values; None without one.
        note: why the layer was left as it was, or what else a reader must know.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    scheme: SchemeField | None = None
    account: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PartRecord(StoredRecord):
    """One committed file of weights.

    Attributes:
        part: index of the file: 0 is what lies outside the blocks, i + 1 is block i.
        plan_digest: digest of the plan that it follows.
        file: storage key of the weights, below the run's root.
        sha256, size_bytes: of that file.
        loaded_bytes: memory that its variables take once loaded.
        previous: digest of the record of the block before, where the result depends on it; else "".
        layers: what became of each layer, in the model's order.
    """

    part: Annotated[int, Field(ge=0, le=99_999)]
    plan_digest: Digest
    file: str
    sha256: Digest
    size_bytes: NumBytes
    loaded_bytes: NumBytes
    previous: Digest | Annotated[str, StringConstraints(max_length=0)] = ""
    layers: tuple[LayerRecord, ...] = ()

    @property
    def key(self) -> str:
        """Storage key below the run's root."""
        return record_key(self.part)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            RecordError: anything else; a single other byte is enough.
        """
        record = super().from_json(data)
        if record.file != file_key(record.part):
            raise RecordError(f"part {record.part} names the file {record.file!r}")
        return record


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """What a file's bytes must be."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sha256: Digest
    size_bytes: NumBytes


@dataclass(frozen=True, kw_only=True)
class Manifest(StoredRecord):
    """All that a finished run consists of; it is written last, and while it is absent nothing is.

    Attributes:
        plan_digest: digest of the plan that was carried out.
        files: every file of the artifact by its storage key below the run's root.
        records: digest of every part's record by its storage key.
        provenance: versions, source and licence, as plain JSON values.
    """

    key: ClassVar[str] = MANIFEST_KEY

    plan_digest: Digest
    files: dict[str, FileDigest]
    records: dict[str, Digest]
    provenance: dict[str, Any]


def block_part(block: int) -> int:
    """Return the part of a block; part 0 is what lies outside the blocks."""
    return block + 1


def file_key(part: int) -> str:
    """Return the storage key of a part's weights, below the run's root."""
    return f"{ARTIFACT_PREFIX}model_{part:05d}.weights.h5"


def record_key(part: int) -> str:
    """Return the storage key of a part's record, below the run's root."""
    return (
        f"{RECORDS_PREFIX}rest.json" if part == 0 else f"{RECORDS_PREFIX}block-{part - 1:05d}.json"
    )


def manifest_of(
    plan_digest: str,
    parts: dict[int, PartRecord],
    other_files: dict[str, bytes],
    provenance: dict[str, Any],
) -> Manifest:
    """Put a run's manifest together.

    Args:
        parts: every part's record.
        other_files: the artifact's small files, such as its JSON, by storage key.
        provenance: versions, source and licence, as plain JSON values.
    """
    weights = {
        record.file: FileDigest(sha256=record.sha256, size_bytes=record.size_bytes)
        for record in parts.values()
    }
    others = {
        key: FileDigest(sha256=sha256(data), size_bytes=len(data))
        for key, data in other_files.items()
    }
    return Manifest(
        plan_digest=plan_digest,
        files={**weights, **others},
        records={record.key: record.record_sha256 for record in parts.values()},
        provenance=provenance,
    )
