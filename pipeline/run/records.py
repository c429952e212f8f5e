"""What a run commits besides weights: a record for each weights file, and the manifest.

Part 0 is everything outside the blocks, part i + 1 is block i, and part p is the artifact's file
`model_{p:05d}.weights.h5`. Where stock Keras holds quantized layers of the part as floats, their
codes are in a second file, `codes/model_{p:05d}.safetensors`. Records hold no time and no host, so
that all executions of one plan write the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import ConfigDict, Field, StringConstraints

from pipeline.canonical import sha256
from pipeline.recipe.recipe import SchemeField
from pipeline.storage.record import STRICT, RecordError, StoredRecord

MANIFEST_KEY = "manifest.json"
ARTIFACT_PREFIX = "artifact/"
CODES_PREFIX = "codes/"
RECORDS_PREFIX = "records/"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
NumBytes = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRecord:
    """The result for one layer; without scheme and account, it was left in float.

    Attributes:
        account: the solver's report as plain JSON values.
        note: why the layer was left in float, or anything else a reader must know.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    scheme: SchemeField | None = None
    account: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRecord:
    """What training did to a solved block; its layers' accounts are of what was solved.

    Attributes:
        kept: "tuned", or "solved" where training made the error on held-back windows no smaller.
        solved_error, tuned_error: of the block's output, Σ‖y − t‖² / ‖t‖² by token, over windows
            that it was not trained on; None where it is not finite.
        num_tokens: of these windows.
        changed_codes: the share of the trained layers' codes that are not those solved.
        norms: by path, the root of the mean square of how a norm's weights changed, relative to
            theirs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kept: Literal["tuned", "solved"]
    solved_error: float | None
    tuned_error: float | None
    num_tokens: int
    changed_codes: float
    norms: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """Digest and size of a file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sha256: Digest
    size_bytes: NumBytes

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Of these bytes."""
        return cls(sha256=sha256(data), size_bytes=len(data))


class CommittedRecord(Protocol):
    """The record of one committed part, whatever a run makes of it."""

    @property
    def part(self) -> int: ...

    @property
    def plan_digest(self) -> str: ...

    @property
    def previous(self) -> str:
        """SHA-256 of the record of the block before, if the result depends on it; else ""."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def layers(self) -> tuple[LayerRecord, ...]: ...

    @property
    def key(self) -> str: ...

    @property
    def files(self) -> Mapping[str, FileDigest]:
        """Everything committed with it, by storage key below the run's root."""

    @property
    def record_sha256(self) -> str: ...

    def to_json(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class PartRecord(StoredRecord):
    """One committed part: its file of weights and, if it has one, its file of codes.

    Attributes:
        file: storage key of the weights, below the run's root; sha256 and size_bytes are its own.
        loaded_bytes: memory that its variables take once loaded.
        previous: SHA-256 of the previous block's record if the result depends on it; else "".
        layers: in the model's order.
        codes: of the file of codes; omitted where there is none.
        tuning: omitted where the recipe asks for none, and where the block has nothing to train.
    """

    part: Annotated[int, Field(ge=0, le=99_999)]
    plan_digest: Digest
    file: str
    sha256: Digest
    size_bytes: NumBytes
    loaded_bytes: NumBytes
    previous: Digest | Annotated[str, StringConstraints(max_length=0)] = ""
    layers: tuple[LayerRecord, ...] = ()
    codes: FileDigest | None = None
    tuning: TuningRecord | None = None

    def content(self) -> dict[str, Any]:
        values = super().content()
        if self.codes is None:
            del values["codes"]
        if self.tuning is None:
            del values["tuning"]
        return values

    @property
    def key(self) -> str:
        return record_key(self.part)

    @property
    def files(self) -> dict[str, FileDigest]:
        """Everything committed with it, by storage key below the run's root; weights first."""
        weights = FileDigest(sha256=self.sha256, size_bytes=self.size_bytes)
        codes = {} if self.codes is None else {codes_key(self.part): self.codes}
        return {self.file: weights, **codes}

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        record = super().from_json(data)
        if record.file != file_key(record.part):
            raise RecordError(f"part {record.part} names the file {record.file!r}")
        return record


@dataclass(frozen=True, kw_only=True)
class Manifest(StoredRecord):
    """Everything that a finished run consists of; it is written last, and makes the run finished.

    Attributes:
        files: every file of the artifact and every file of codes, by storage key below the run's
            root.
        records: SHA-256 of every part's record, by storage key.
        provenance: source, recipe, machine and versions, as plain JSON values.
    """

    key: ClassVar[str] = MANIFEST_KEY

    plan_digest: Digest
    files: dict[str, FileDigest]
    records: dict[str, Digest]
    provenance: dict[str, Any]


def file_key(part: int) -> str:
    """Storage key of a part's weights, below the run's root."""
    return f"{ARTIFACT_PREFIX}model_{part:05d}.weights.h5"


def is_weights_file(key: str) -> bool:
    """Whether a storage key is that of a part's weights."""
    return key.startswith(f"{ARTIFACT_PREFIX}model_") and key.endswith(".weights.h5")


def codes_key(part: int) -> str:
    """Storage key of a part's codes, below the run's root."""
    return f"{CODES_PREFIX}model_{part:05d}.safetensors"


def record_key(part: int) -> str:
    """Storage key of a part's record, below the run's root."""
    return f"{RECORDS_PREFIX}{f'block-{part - 1:05d}' if part else 'rest'}.json"


def manifest_of(
    plan_digest: str,
    parts: Mapping[int, CommittedRecord],
    other_files: dict[str, bytes],
    provenance: dict[str, Any],
) -> Manifest:
    """A run's manifest, from every part's record and the artifact's other files by storage key."""
    files = {key: file for record in parts.values() for key, file in record.files.items()}
    for key, data in other_files.items():
        files[key] = FileDigest.of(data)
    return Manifest(
        plan_digest=plan_digest,
        files=files,
        records={record.key: record.record_sha256 for record in parts.values()},
        provenance=provenance,
    )
