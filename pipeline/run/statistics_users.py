"""Which runs use a folder of statistics, noted there, so that nothing has to be searched for them.

A note is the URL of a run's root. It outlives the run: whoever asks looks whether that is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.run import lease
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import StoredRecord

USERS_PREFIX = "users/"
_FOLDER = re.compile(r"/[0-9a-f]{64}$")
_BEFORE_PLAN = (USERS_PREFIX, lease.PREFIX, "tokens/")
"""What is written before the plan, and may be left where that never was."""


@dataclass(frozen=True, kw_only=True)
class StatisticsUser(StoredRecord):
    """A run that uses the statistics beside which this is."""

    run_url: str


def note_user(found: ObjectStore, run_url: str) -> None:
    """Note that a run uses the statistics at a store's root; before it captures or reads them."""
    note = StatisticsUser(run_url=run_url)
    # Over one that was damaged, too.
    found.put(f"{USERS_PREFIX}{sha256(run_url.encode())[:32]}.json", note.to_json())


def holds_statistics(store: ObjectStore) -> bool:
    """Whether a store's root is a folder of statistics, begun at least, and nothing else."""
    if not _FOLDER.search(store.root_url):
        return False
    try:
        return read_plan(store).makes == "statistics"
    except DamagedObjectError:
        return bool(store.list(USERS_PREFIX))
    except MissingObjectError:
        return all(key.startswith(_BEFORE_PLAN) for key in store.list())


def users(found: ObjectStore, *, unfinished: bool = False) -> frozenset[str]:
    """The URLs of the runs that use the statistics at a store's root, and still exist.

    Args:
        unfinished: only those that have not solved all of their blocks.
    """
    named = set()
    for key in found.list(USERS_PREFIX):
        try:
            run = open_store(StatisticsUser.read(found, key).run_url)
        except (DamagedObjectError, MissingObjectError):
            continue  # statistics can be captured again, should that run need them
        if run.exists(PLAN_KEY) and not (unfinished and run.exists(MANIFEST_KEY)):
            named.add(run.root_url)
    return frozenset(named)
