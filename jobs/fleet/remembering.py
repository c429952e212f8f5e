"""What a pass over a catalog leaves for people: a record of its night, and the fleet's page.

Nothing is decided by either, so where one cannot be written that is said, and changes no outcome.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

from jobs.catalog.catalog_file import Catalog
from jobs.fleet.fleet_report import update_fleet_report
from jobs.fleet.nights import (
    FAILED,
    MOST_NIGHTS,
    Clock,
    NightEntry,
    latest,
    read_nights,
    save_night,
)
from jobs.logging import log_event
from pipeline.errors import PipelineError
from pipeline.storage.object_store import ObjectStore


@contextlib.contextmanager
def remembering(
    root: ObjectStore,
    catalog: Catalog,
    file: str,
    began: Clock,
    num_entries: int,
    entries: Callable[[], Iterable[NightEntry]],
) -> Iterator[None]:
    """Leave a night and the fleet's page behind when the block ends, however it does.

    Args:
        catalog: the whole of it, even if the pass is over some of its models.
        file: of the catalog, as it was given.
        num_entries: that the pass is over.
        entries: what became of them so far, those that were up to date among them.
    """
    try:
        yield
    finally:
        with _telling("no record of this pass"):
            found = worth_keeping(root, entries())
            save_night(root, began.night(file, num_entries, found))
        with _telling("no new page of the fleet"):
            update_fleet_report(root, catalog)


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except (PipelineError, OSError) as problem:
        message = f"{what} could be written, which changes no outcome: {problem}"
        log_event("not written", message, level=logging.WARNING)


def worth_keeping(root: ObjectStore, entries: Iterable[NightEntry]) -> list[NightEntry]:
    """Entries that were not up to date; and those that are again, since they last failed.

    Nothing else in storage tells that a source is back which was away for a night.
    """
    before = latest(read_nights(root, MOST_NIGHTS)[0])
    failed = {names for names, (_, entry) in before.items() if entry.result in FAILED}
    return [
        entry
        for entry in entries
        if entry.result != "up to date" or (entry.model, entry.recipe) in failed
    ]
