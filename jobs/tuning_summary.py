"""What training blocks did in a finished run, as its summary tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.run.records import TuningRecord


@dataclass(frozen=True, kw_only=True)
class TuningSummary:
    """What training blocks did, on windows that they were not trained on.

    Attributes:
        num_blocks: that were trained; num_kept: of these, where the result was better.
        solved_error, error: means over the blocks, as they were solved and as they were kept; None
            where a block's is not finite.
    """

    num_blocks: int
    num_kept: int
    solved_error: float | None
    error: float | None

    @classmethod
    def of(cls, records: Sequence[TuningRecord]) -> TuningSummary | None:
        """Of all blocks' records."""
        if not records:
            return None
        solved = [record.solved_error for record in records]
        kept = [x.tuned_error if x.kept == "tuned" else x.solved_error for x in records]
        return cls(
            num_blocks=len(records),
            num_kept=sum(record.kept == "tuned" for record in records),
            solved_error=_mean(solved),
            error=_mean(kept),
        )

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"{self.num_kept} of {self.num_blocks} blocks are better for it; mean error of a block "
            f"on windows held back {_shown(self.solved_error)} → {_shown(self.error)}"
        )


def _mean(errors: Sequence[float | None]) -> float | None:
    finite = [error for error in errors if error is not None]
    return sum(finite) / len(errors) if len(finite) == len(errors) else None


def _shown(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4f}"
