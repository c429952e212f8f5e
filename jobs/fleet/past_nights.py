"""What past passes over a catalog took beside what the logs of their runs tell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.fleet.nights import Night, read_nights
from jobs.logging import log_event
from jobs.quantities import duration
from pipeline.storage.object_store import ObjectStore

_MOST_NIGHTS = 20
_MOST_TIMES = 5
"""Of one run, or of passes: the latest."""


@dataclass(frozen=True)
class PastNights:
    """Passes over a catalog, oldest first."""

    nights: Sequence[Night]

    @classmethod
    def read(cls, root: ObjectStore) -> PastNights:
        """The latest below a catalog's root; those that are damaged are left out."""
        return cls(read_nights(root, _MOST_NIGHTS)[0])

    def around_seconds(self, model: str, recipe_name: str) -> tuple[float, ...]:
        """What each took to start and plan a run, and to evaluate and publish it."""
        found = [
            entry.around_seconds
            for night in self.nights
            for entry in night.entries
            if (entry.model, entry.recipe) == (model, recipe_name)
            and entry.around_seconds is not None
        ]
        return tuple(found[-_MOST_TIMES:])

    @property
    def outside_seconds(self) -> tuple[float, ...]:
        """What each took outside of all runs."""
        found = [night.outside_seconds for night in self.nights]
        return tuple(seconds for seconds in found if seconds is not None)[-_MOST_TIMES:]

    def tell(self) -> None:
        """Log what a pass takes beside its runs, where that is known."""
        if seconds := self.outside_seconds:
            usual = statistics.median(seconds)
            log_event(
                "pass",
                f"a pass takes {duration(usual)} beside its runs, as {len(seconds)} did before",
                {"seconds": usual, "corrected_by": len(seconds)},
            )
