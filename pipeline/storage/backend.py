"""What every kind of store does for `ObjectStore`, which checks keys and contents around it.

How long a remote store may keep a run waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """What a store knows of an object without reading it.

    Attributes:
        token: another one whenever the object was written; the same bytes written again may have
            the same one. No token says anything about other stores.
        size_bytes: of the object.
        modified: when it was written, in seconds since 1970 by the store's clock: for people to
            read, since clocks differ.
    """

    token: str
    size_bytes: int
    modified: float


class Backend(Protocol):
    """What keeps the bytes. Keys have been checked; missing ones raise FileNotFoundError."""

    def read(self, key: str, num_bytes: int | None) -> bytes:
        """Read the whole object; `num_bytes` is its size where the caller knows it."""

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop); fewer at the object's end."""

    def size(self, key: str) -> int:
        """Return the object's size in bytes."""

    def write(self, key: str, data: bytes) -> None:
        """Overwrite: readers see the old bytes or the new ones, nothing in between."""

    def create(self, key: str, data: bytes) -> None:
        """Write if nothing is there; FileExistsError otherwise, even if it was our own try."""

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        """Write if the object holds `expected`; FileExistsError otherwise, even by our own try."""

    def version(self, key: str) -> Version:
        """Return what is known of the object without reading it."""

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        """Yield the same of every object whose key begins with `prefix`, in any order."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that begins with `prefix`, in any order."""

    def delete(self, key: str) -> None:
        """Remove the object; it may be absent."""

    def leftovers(self) -> Iterator[str]:
        """Yield the names of what interrupted writes left behind, below the root."""

    def sweep(self, leftover: str) -> None:
        """Remove what `leftovers` named; it may be absent."""


PATIENCE_VARIABLE = "QUANTFLEET_STORAGE_PATIENCE"
"""Environment variable: `Patience.deadline_seconds` of every store that is opened without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a remote store may keep us waiting. Local stores never do."""

    deadline_seconds: float = 300.0
    """An operation is tried again until this long after its first try: the longest outage of the
    store that only makes work wait."""
    connect_seconds: float = 3.0
    """Limit for opening a connection."""
    read_seconds: float = 20.0
    """Limit for silence while an answer is awaited."""
    longest_pause_seconds: float = 5.0
    """Pauses between tries double, with jitter, up to this."""

    @classmethod
    def configured(cls) -> Patience:
        """As this process' environment says.

        Raises:
            StorageError: it says something that is no number of seconds.
        """
        given = os.environ.get(PATIENCE_VARIABLE)
        if given is None:
            return cls()
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            raise StorageError(f"{PATIENCE_VARIABLE} must be a number of seconds, not {given!r}")
        return cls(deadline_seconds=seconds)
