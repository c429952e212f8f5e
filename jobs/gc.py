"""`quantfleet gc`: delete what no manifest, plan or living run refers to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from rich.table import Table

from jobs.catalog.request import RUNS_PREFIX
from jobs.logging import log_event, print_json, status
from jobs.publish.retention import (
    Unneeded,
    is_catalog_root,
    is_still_unneeded,
    unneeded_runs,
)
from jobs.publish.verified_files import seen_key
from jobs.quantities import size
from pipeline.errors import PipelineError
from pipeline.run import lease
from pipeline.run.garbage import Garbage, find_garbage, find_runs, remove, whole_run
from pipeline.storage.object_store import ObjectStore, open_store


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What became of one run.

    Attributes:
        url: of the run.
        garbage: what nobody needs.
        deleted: whether it is gone.
        skipped: why it is not, though it was to be.
    """

    url: str
    garbage: tuple[Garbage, ...] = ()
    deleted: bool = False
    skipped: str = ""


def collect(
    url: str,
    *,
    delete: bool,
    lease_seconds: float,
    as_json: bool,
    unpublished: bool = False,
) -> None:
    """Find, and delete if asked, the garbage of the runs at and below a URL.

    At a catalog's root that is also whole runs that its releases refer to no more.

    Args:
        unpublished: also whole runs of which nothing was ever published.

    Raises:
        PipelineError: there is no run.
    """
    store = open_store(url)
    whole = unneeded_runs(store, unpublished=unpublished) if is_catalog_root(store) else {}
    runs = {run.rstrip("/"): None for run in find_runs(store)}
    runs |= dict.fromkeys(f"{RUNS_PREFIX}{run_id}" for run_id in whole)
    if not runs:
        raise PipelineError(f"{url}: no run lies there or below it (no plan.json)")
    swept = []
    for run in sorted(runs):
        root = f"{store.root_url}/{run}".rstrip("/")
        unneeded = whole.get(run.removeprefix(RUNS_PREFIX))
        with status(f"looking through {root}"):
            if unneeded is None:
                one = _sweep(open_store(root), delete=delete, lease_seconds=lease_seconds)
            else:
                one = _sweep_whole(
                    store, unneeded, open_store(root), delete=delete, lease_seconds=lease_seconds
                )
        swept.append(one)
    found = [dataclasses.asdict(one) for one in swept]
    if as_json:
        print_json(found)
        return
    log_event("swept", "", {"runs": found}, table=_table(swept))
    if not delete and any(one.garbage for one in swept):
        log_event("kept", "nothing was deleted; add --delete to do so")


def _sweep(store: ObjectStore, *, delete: bool, lease_seconds: float) -> Swept:
    url = store.root_url
    try:
        if not delete:
            return Swept(url=url, garbage=find_garbage(store))
        with lease.acquire(store, seconds=lease_seconds, wait=False) as held:
            # Only now: what a driver at work writes may be needed a moment later.
            garbage = find_garbage(store)
            for one in garbage:
                held.check()
                remove(store, one)
        return Swept(url=url, garbage=garbage, deleted=True)
    except PipelineError as error:
        return Swept(url=url, skipped=str(error))


def _sweep_whole(
    root: ObjectStore, run: Unneeded, store: ObjectStore, *, delete: bool, lease_seconds: float
) -> Swept:
    url = store.root_url
    try:
        if not delete:
            return Swept(url=url, garbage=whole_run(store, run.reason))
        with lease.acquire(store, seconds=lease_seconds, wait=False) as held:
            if not is_still_unneeded(root, run):
                return Swept(url=url, skipped="a release of it was made current meanwhile")
            garbage = whole_run(store, run.reason)
            for one in garbage:
                if not one.key.startswith(lease.PREFIX):
                    held.check()
                    remove(store, one)
        # What the holder last said, too: nobody is to find a run here.
        for key in store.list(lease.PREFIX):
            store.delete(key)
        root.delete(seen_key(run.run_id))
    except PipelineError as error:
        return Swept(url=url, skipped=str(error))
    return Swept(url=url, garbage=garbage, deleted=True)


def _table(swept: list[Swept]) -> Table:
    table = Table("run", "what", "objects", "bytes", "")
    for one in swept:
        if one.skipped:
            table.add_row(one.url, "", "", "", f"skipped: {one.skipped}")
            continue
        counts = Counter(g.reason for g in one.garbage)
        for reason, number in sorted(counts.items()):
            freed = sum(g.size_bytes for g in one.garbage if g.reason == reason)
            done = "deleted" if one.deleted else "could go"
            table.add_row(one.url, reason, str(number), size(freed), done)
        if not counts:
            table.add_row(one.url, "nothing", "0", size(0), "")
    return table
