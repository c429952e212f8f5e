"""Which runs use a folder of statistics, noted there, so that nothing has to be searched for them.

A note is the URL of a run's root. It outlives the run: whoever asks looks whether that is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.canonical import sha256
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.plan import PLAN_KEY
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import StoredRecord

USERS_PREFIX = "users/"
_FOLDER = re.compile(rf"(?:^|/){STATISTICS_FOLDER}/[0-9a-f]{{64}}/?$")


@dataclass(frozen=True, kw_only=True)
class StatisticsUser(StoredRecord):
    """A run that uses the statistics beside which this is."""

    run_url: str


def note_user(found: ObjectStore, run_url: str) -> None:
    """Note that a run uses the statistics at a store's root; before it captures or reads them."""
    note = StatisticsUser(run_url=run_url)
    found.create(f"{USERS_PREFIX}{sha256(run_url.encode())[:32]}.json", note.to_json())


def holds_statistics(url: str) -> bool:
    """Whether a folder is one of statistics, by its name."""
    return _FOLDER.search(url) is not None


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
