"""What a run that captures statistics commits: the sums of each block, and a record of them.

The file of a block holds, for each of its input groups, Σxᵀx over all calibration tokens of the
float model: the upper triangle with its diagonal, row after row, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from pipeline.plan import InputGroup, Plan
from pipeline.run.records import Digest, FileDigest, LayerRecord, NumBytes, record_key
from pipeline.storage.record import STRICT, StoredRecord

SUMS_PREFIX = "sums/"
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSum:
    """The sum over one input of a block.

    Attributes:
        targets: the layers' names within the block that share it.
        num_rows: tokens that it covers.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    targets: tuple[str, ...]
    in_features: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class SumsRecord(StoredRecord):
    """The committed sums of one block.

    Attributes:
        part: as of the block's weights: block i is part i + 1.
        sha256, size_bytes: of the file.
        sums: in the order of the file's arrays.
        previous, layers: sums depend on no other block's, and quantize no layer.
    """

    part: Annotated[int, Field(ge=1, le=99_999)]
    plan_digest: Digest
    sha256: Digest
    size_bytes: NumBytes
    sums: tuple[StoredSum, ...]
    previous: ClassVar[str] = ""
    layers: ClassVar[tuple[LayerRecord, ...]] = ()

    @property
    def key(self) -> str:
        return record_key(self.part)

    @property
    def files(self) -> dict[str, FileDigest]:
        """The file, by storage key below the run's root."""
        return {sums_key(self.part): FileDigest(sha256=self.sha256, size_bytes=self.size_bytes)}


def sums_key(part: int) -> str:
    """Storage key of a block's sums, below the root of the run that captures them."""
    return f"{SUMS_PREFIX}block-{part - 1:05d}.safetensors"


def triangle(in_features: int) -> int:
    """Numbers in the upper triangle of a Gram, with its diagonal."""
    return in_features * (in_features + 1) // 2


def sums_bytes(groups: Iterable[InputGroup]) -> int:
    """What the sums over such inputs take in storage."""
    return sum(_FLOAT_BYTES * triangle(group.in_features) for group in groups)


def statistics_bytes(plan: Plan) -> int:
    """What the statistics take that a run uses, or that it captures; 0 where it does neither."""
    if plan.makes == "statistics":
        return sum(sums_bytes(part.groups) for part in plan.parts)
    return sum(sums_bytes(part.captured) for part in plan.parts)
