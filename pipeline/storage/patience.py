"""How long a remote store may keep a run waiting."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.errors import StorageError

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
