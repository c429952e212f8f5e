"""Sums over the float model's inputs as they are stored (see `pipeline.run.sums_records`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.safetensors_file import read_safetensors, safetensors_bytes
from pipeline.errors import DamagedObjectError, MissingObjectError, StatisticsError
from pipeline.plan import InputGroup, Plan
from pipeline.run.commits import verify_and_seal
from pipeline.run.records import (
    CommittedRecord,
    FileDigest,
    Manifest,
    manifest_of,
    record_key,
)
from pipeline.run.sums_records import StoredSum, SumsRecord, sums_key, triangle
from pipeline.run.worker_api import InputSum
from pipeline.storage.object_store import ObjectStore

Float32 = NDArray[np.float32]


def encode_sums(
    plan_digest: str, part: int, groups: Sequence[InputGroup], sums: Sequence[InputSum]
) -> tuple[SumsRecord, dict[str, bytes]]:
    """A block's record and the file that it names, by storage key.

    Args:
        plan_digest: of the plan that captures them.
        sums: of each group, in NumPy.
    """
    arrays = {_name(stage): _packed(total.arrays) for stage, total in enumerate(sums)}
    data = safetensors_bytes(arrays, {})
    file = FileDigest.of(data)
    record = SumsRecord(
        part=part,
        plan_digest=plan_digest,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        sums=tuple(
            StoredSum(targets=group.targets, in_features=group.in_features, num_rows=total.num_rows)
            for group, total in zip(groups, sums, strict=True)
        ),
    )
    return record, {sums_key(part): data}


def finalize_statistics(
    plan: Plan, store: ObjectStore, records: Mapping[int, CommittedRecord]
) -> Manifest:
    """Verify every stored file, and commit the manifest of a run that captures statistics.

    Raises:
        DamagedObjectError: a stored file differs from what was committed; resume repairs it.
    """
    provenance = {
        "source_digest": plan.source_digest,
        "model": plan.model,
        "machine": plan.machine,
        "versions": plan.versions,
        "tokens_sha256": None if plan.tokens is None else plan.tokens.digest,
    }
    return verify_and_seal(store, manifest_of(plan.digest, records, {}, provenance))


class BlockSums:
    """The stored sums of one block, each made whole when it is asked for."""

    def __init__(self, sums: Sequence[StoredSum], arrays: Mapping[str, Float32]) -> None:
        self._places = {name: stage for stage, one in enumerate(sums) for name in one.targets}
        self._sums, self._arrays = sums, arrays

    @classmethod
    def read(cls, store: ObjectStore, plan_digest: str, part: int) -> BlockSums:
        """Read and check what `encode_sums` gave.

        Args:
            store: opened at the root of the run that captured them.
            plan_digest: of that run.

        Raises:
            StatisticsError: they are missing or damaged.
        """
        try:
            record = SumsRecord.read(store, record_key(part))
            if (record.part, record.plan_digest) != (part, plan_digest):
                raise DamagedObjectError(
                    f"{store.url(record_key(part))} is damaged: it is of part {record.part} of "
                    f"plan {record.plan_digest}"
                )
            data = store.get(sums_key(part), sha256=record.sha256, size=record.size_bytes)
        except (DamagedObjectError, MissingObjectError) as error:
            raise StatisticsError(f"statistics cannot be used: {error}") from error
        tensors, _ = read_safetensors(data)
        return cls(record.sums, tensors)

    def of(self, name: str) -> InputSum:
        """The sum over a layer's input.

        Args:
            name: the layer's, within its block.
        """
        stage = self._places[name]
        one = self._sums[stage]
        whole = _unpacked(self._arrays[_name(stage)], one.in_features)
        return InputSum(kind="hessian", arrays=(whole,), num_rows=one.num_rows)


def _name(stage: int) -> str:
    return f"{stage:05d}"


def _packed(bands: Sequence[Float32]) -> Float32:
    """The rows of a Gram, each from its diagonal on, one after another.

    Args:
        bands: of rows, [b - a, C - a], from the diagonal on.
    """
    size = bands[0].shape[1]
    packed = np.empty(triangle(size), np.float32)
    end = 0
    for band in bands:
        for row, values in enumerate(band):
            start, end = end, end + len(values) - row
            packed[start:end] = values[row:]
    assert end == len(packed)
    return packed


def _unpacked(packed: Float32, size: int) -> Float32:
    """The inverse of `_packed`, as one band; what is below the diagonal is zero."""
    band = np.zeros((size, size), np.float32)
    end = 0
    for row in range(size):
        start, end = end, end + size - row
        band[row, row:] = packed[start:end]
    return band
