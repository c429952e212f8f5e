"""Opening a store that a user has just named: one that does not answer soon is a mistake."""

from __future__ import annotations

import dataclasses

from pipeline.storage.backend import Patience
from pipeline.storage.object_store import ObjectStore, open_store

_DEADLINE_SECONDS = 15.0


def reachable(url: str, key: str) -> ObjectStore:
    """Open the store at a URL, and make sure that it answers, by asking for a key.

    During a run a store may be away for minutes (see `Patience`), but not when it is named.

    Raises:
        StorageError: it does not answer, or refuses.
    """
    patience = Patience.configured()
    soon = min(_DEADLINE_SECONDS, patience.deadline_seconds)
    open_store(url, dataclasses.replace(patience, deadline_seconds=soon)).exists(key)
    return open_store(url)
