"""What is known of a finished result's quality: a record for everything it was evaluated on.

Evaluations come after the manifest and are no part of it: a result may be evaluated again, on other
texts or by a later version. Other machines round otherwise, so the latest evaluation counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from pipeline.calibration.windows import TokenWindows
from pipeline.canonical import digest_of
from pipeline.errors import DamagedObjectError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import Fidelity
from pipeline.run.records import Digest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

EVALUATIONS_PREFIX = "evaluations/"


@dataclass(frozen=True, kw_only=True)
class Evaluation(StoredRecord):
    """A result beside its source on one set of texts and tasks.

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
    def of(cls, manifest_sha256: str, given: EvaluationSet, fidelity: Fidelity) -> Self:
        """The evaluation of a result on token windows, tasks or both."""
        return cls(
            manifest_sha256=manifest_sha256,
            measured_on=measured_on(given),
            figures=fidelity.figures(),
        )

    @property
    def key(self) -> str:
        """Storage key below the run's root, named by what was measured on."""
        return f"{EVALUATIONS_PREFIX}{digest_of(self.measured_on)}.json"

    def save(self, run: ObjectStore) -> None:
        """Write the record, over an earlier one of the same texts."""
        run.put(self.key, self.to_json())


def measured_on(given: EvaluationSet) -> dict[str, Any]:
    """What an evaluation on token windows, tasks or both says of them."""
    found = {} if given.windows is None else _identity(given.windows)
    if given.named:
        found["sets"] = {name: _identity(windows) for name, windows in given.named.items()}
    if given.tasks:
        found["tasks"] = {task.name: task.sha256 for task in given.tasks}
    return found


def _identity(windows: TokenWindows) -> dict[str, Any]:
    return {
        "texts_sha256": windows.fingerprint,
        "tokens_sha256": windows.digest,
        "num_windows": len(windows.lengths),
        "sequence_length": windows.tokens.shape[1],
    }


def find_evaluations(
    run: ObjectStore, manifest_sha256: str, tell: Callable[[str], None]
) -> tuple[Evaluation, ...]:
    """All evaluations of a result, by key; those of another result in its place are left out.

    So are damaged ones: what they said is lost, and another evaluation makes them again.

    Args:
        run: opened at the run's root.
        tell: is told of each that is damaged.
    """
    found = []
    for key in run.list(EVALUATIONS_PREFIX):
        try:
            found.append(Evaluation.read(run, key))
        except DamagedObjectError as error:
            tell(f"left out: {error}; delete it, and evaluate again")
    return tuple(one for one in found if one.manifest_sha256 == manifest_sha256)


def not_finite(evaluations: Iterable[Evaluation]) -> str | None:
    """Where a result gives values that are not finite, in words; None if none was found to."""
    found = (evaluation.figures.get("not_finite") for evaluation in evaluations)
    return next(filter(None, found), None)
