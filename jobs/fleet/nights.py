"""What nights made of a catalog, kept below its root: why each entry was made, what became of it.

ROOT/report/nights/20261130T021500.123-….json   one for each night on which anything was to be done

They are for people, and tell a dry run how long a pass may take; nothing is decided by them.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord

NIGHTS_PREFIX = "report/nights/"
MOST_NIGHTS = 90
"""That anyone looks back at."""
FAILED = ("failed", "gate failed")
"""Results that need a hand."""
_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class NightEntry:
    """What became of one entry.

    Attributes:
        request_id: "" where its files could not be looked at.
        result: as `nightly` or `submit` names it.
        reasons: why it was to be made, or could not be looked at.
        text: what became of it, in words.
        seconds: that it took in the pass; None, and omitted, unless it was made.
        driven_seconds: of these, from its claim to its manifest, statistics among them; likewise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: str
    recipe: str
    request_id: str
    result: str
    reasons: tuple[str, ...]
    text: str
    seconds: float | None = None
    driven_seconds: float | None = None

    @property
    def around_seconds(self) -> float | None:
        """To start and plan, and to evaluate and publish; None unless it was made."""
        if self.seconds is None or self.driven_seconds is None:
            return None
        return max(0.0, self.seconds - self.driven_seconds)


@dataclass(frozen=True, kw_only=True)
class Night(StoredRecord):
    """One pass over a catalog.

    Attributes:
        catalog: its file or URL, as it was given.
        began: by the driver's clock, in UTC, as ISO 8601.
        num_entries: that were looked at.
        entries: those that were not up to date, or that are again after they failed.
    """

    catalog: str
    began: str
    seconds: float
    num_entries: int
    entries: tuple[NightEntry, ...]

    def content(self) -> dict[str, Any]:
        values = super().content()
        for entry in values["entries"]:
            for name in ("seconds", "driven_seconds"):
                if entry[name] is None:
                    del entry[name]  # older versions did not know them
        return values

    @property
    def outside_seconds(self) -> float | None:
        """Outside of all entries; None unless every entry of the pass was made."""
        took = [entry.seconds for entry in self.entries]
        known = [seconds for seconds in took if seconds is not None]
        if not known or len(known) < len(took):
            return None
        return max(0.0, self.seconds - sum(known))

    @property
    def began_at(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(self.began)

    @property
    def ended_at(self) -> datetime.datetime:
        return self.began_at + datetime.timedelta(seconds=self.seconds)


@dataclass(frozen=True)
class Clock:
    """When a pass began."""

    began: datetime.datetime

    @classmethod
    def started(cls) -> Clock:
        return cls(datetime.datetime.now(datetime.UTC))

    def night(self, catalog: str, num_entries: int, entries: Sequence[NightEntry]) -> Night:
        """The pass that ends now."""
        passed = datetime.datetime.now(datetime.UTC) - self.began
        return Night(
            catalog=catalog,
            began=self.began.isoformat(timespec="milliseconds"),
            seconds=round(passed.total_seconds(), 1),
            num_entries=num_entries,
            entries=tuple(entries),
        )


def save_night(root: ObjectStore, night: Night) -> None:
    """Keep a night; one on which everything was up to date leaves nothing."""
    if night.entries:
        at = night.began_at
        stamp = f"{at:%Y%m%dT%H%M%S}.{at.microsecond // 1000:03}"
        root.create(f"{NIGHTS_PREFIX}{stamp}-{secrets.token_hex(4)}.json", night.to_json())


def read_nights(root: ObjectStore, most: int) -> tuple[tuple[Night, ...], int]:
    """The latest nights, oldest first, and how many of these are damaged."""
    keys = sorted(root.list(NIGHTS_PREFIX))[-most:]

    def read(key: str) -> Night | None:
        try:
            night = Night.read(root, key)
            return night if night.ended_at.tzinfo else None
        except (DamagedObjectError, MissingObjectError, ValueError, OverflowError):
            return None

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = tuple(night for night in pool.map(read, keys) if night is not None)
    return found, len(keys) - len(found)


def latest(nights: Iterable[Night]) -> dict[tuple[str, str], tuple[Night, NightEntry]]:
    """Of each model and recipe, the last of these nights that had to do with it, by their ends.

    One that began while another was at work may only have found that out.
    """
    ordered = sorted(nights, key=lambda night: night.ended_at)
    return {
        (entry.model, entry.recipe): (night, entry) for night in ordered for entry in night.entries
    }
