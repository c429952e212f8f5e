"""What is known of a finished result's quality: a record for everything it was evaluated on.

Evaluations come after the manifest and are no part of it: a result may be evaluated again, on other
texts or by a later version. Other machines round otherwise, so the latest evaluation counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from pipeline.calibration.windows import TokenWindows
from pipeline.canonical import digest_of, sha256
from pipeline.fidelity import Fidelity
from pipeline.run.records import Digest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

EVALUATIONS_PREFIX = "evaluations/"


@dataclass(frozen=True, kw_only=True)
class Evaluation(StoredRecord):
    """A result beside its source on one set of texts.

    Attributes:
        manifest_sha256: of the result.
        measured_on: digests and sizes of what it was measured on, as plain JSON values. No URL:
            records are published.
        figures: what was found (see `Fidelity.figures`), as plain JSON values.
    """

    manifest_sha256: Digest
    measured_on: dict[str, Any]
    figures: dict[str, Any]

    @classmethod
    def of(cls, manifest_sha256: str, windows: bytes, fidelity: Fidelity) -> Self:
        """The evaluation of a result on token windows, serialized."""
        read = TokenWindows.from_bytes(windows)
        return cls(
            manifest_sha256=manifest_sha256,
            measured_on={
                "texts_sha256": read.fingerprint,
                "tokens_sha256": sha256(windows),
                "num_windows": len(read.lengths),
                "sequence_length": read.tokens.shape[1],
            },
            figures=fidelity.figures(),
        )

    @property
    def key(self) -> str:
        """Storage key below the run's root, named by what was measured on."""
        return f"{EVALUATIONS_PREFIX}{digest_of(self.measured_on)}.json"

    def save(self, run: ObjectStore) -> None:
        """Write the record, over an earlier one of the same texts."""
        run.put(self.key, self.to_json())


def find_evaluations(run: ObjectStore, manifest_sha256: str) -> tuple[Evaluation, ...]:
    """All evaluations of a result, by key; those of another result in its place are left out.

    Args:
        run: opened at the run's root.

    Raises:
        DamagedObjectError: one of them cannot be read.
    """
    found = (Evaluation.read(run, key) for key in run.list(EVALUATIONS_PREFIX))
    return tuple(one for one in found if one.manifest_sha256 == manifest_sha256)
