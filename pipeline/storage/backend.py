"""The interface of a storage backend, and how long a remote one may take.

`ObjectStore` is the only user: it checks keys and contents around every call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """What a store knows about an object without reading it."""

    token: str
    """Changes when other bytes are written; comparable within one store only."""
    size_bytes: int
    modified: float
    """Seconds since 1970 by the store's clock: for display only."""


class Backend(Protocol):
    """Stores bytes under keys, which are valid. A missing object raises FileNotFoundError."""

    is_writable: bool = True
    """Whether it can create an object once, which all that is kept of a run needs."""

    def read(self, key: str, num_bytes: int | None) -> bytes:
        """Read the whole object; `num_bytes` is its size if the caller knows it."""

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop); fewer at the object's end."""

    def write(self, key: str, data: bytes) -> None:
        """Write atomically: readers see either the old bytes or the new ones."""

    def create(self, key: str, data: bytes) -> None:
        """Write if no object exists, else raise FileExistsError, even if our own retry wrote it."""

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        """Write if the object equals `expected`, else raise FileExistsError, as in `create`."""

    def version(self, key: str) -> Version: ...

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        """Yield key and version of every object whose key begins with `prefix`, in any order."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield every key that begins with `prefix`, in any order."""
        return (key for key, _ in self.versions(prefix))

    def folders(self, prefixes: Sequence[str]) -> Iterator[tuple[str, dict[str, Version]]]:
        """Yield the objects of each of several folders, in their order (see `ObjectStore.folders`).

        Keys are below the folder.
        """
        for prefix in prefixes:
            found = {key.removeprefix(prefix): one for key, one in self.versions(prefix)}
            yield prefix, found

    def delete(self, key: str) -> None:
        """Remove the object, or a leftover; it may be absent."""

    def leftovers(self) -> Iterator[str]:
        """Yield the paths, below the root, of partial files left by interrupted writes."""
        return iter(())


PATIENCE_VARIABLE = "QUANTFLEET_STORAGE_PATIENCE"
"""Environment variable with `Patience.deadline_seconds`, for stores opened without a patience."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to wait for a remote store."""

    deadline_seconds: float = 300.0
    """An operation is retried until this long after its first attempt, so this is the longest
    outage that a run survives."""
    connect_seconds: float = 3.0
    """Limit for opening a connection."""
    read_seconds: float = 20.0
    """Limit for waiting on a silent connection."""
    longest_pause_seconds: float = 5.0
    """Pauses between attempts double, with jitter, up to this."""

    @classmethod
    def configured(cls) -> Patience:
        """The patience that the environment asks for.

        Raises:
            StorageError: the variable is not a number of seconds.
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
