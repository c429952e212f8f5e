"""Places that a user has just named: as any process finds them, and whether they answer."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pipeline.storage.backend import Patience
from pipeline.storage.object_store import ObjectStore, open_store

_DEADLINE_SECONDS = 15.0


def absolute(url: str) -> str:
    """A local path as any process of this machine finds it; URLs as they are."""
    is_local = bool(url) and "://" not in url
    # Storage URLs hold no "..".
    return os.path.normpath(Path(url).expanduser().absolute()) if is_local else url


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
