"""`quantfleet gc`: delete what no manifest, plan or living run refers to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jobs.quantities import size
from pipeline import lease
from pipeline.errors import LeaseHeldError, PipelineError
from pipeline.garbage import Garbage, find_garbage, find_runs, remove
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
    url: str, console: Console, *, delete: bool, lease_seconds: float, as_json: bool
) -> None:
    """Find, and delete if asked, the garbage of the runs at and below a URL.

    Raises:
        PipelineError: there is no run.
    """
    store = open_store(url)
    runs = find_runs(store)
    if not runs:
        raise PipelineError(f"{url}: no run lies there or below it (no plan.json)")
    swept = []
    for run in runs:
        root = f"{store.root_url}/{run}".rstrip("/")
        with console.status(f"looking through {root}"):
            swept.append(_sweep(open_store(root), delete=delete, lease_seconds=lease_seconds))
    if as_json:
        sys.stdout.write(json.dumps([dataclasses.asdict(one) for one in swept], indent=2) + "\n")
        return
    console.print(_table(swept))
    if not delete and any(one.garbage for one in swept):
        console.print("nothing was deleted; add --delete to do so")


def _sweep(store: ObjectStore, *, delete: bool, lease_seconds: float) -> Swept:
    url = store.root_url
    try:
        if not delete:
            return Swept(url=url, garbage=find_garbage(store))
        with _held(store, lease_seconds) as held:
            # Only now: what a driver at work writes may be needed a moment later.
            garbage = find_garbage(store)
            for one in garbage:
                held.check()
                remove(store, one)
        return Swept(url=url, garbage=garbage, deleted=True)
    except (LeaseHeldError, PipelineError) as error:
        return Swept(url=url, skipped=str(error))


@contextlib.contextmanager
def _held(store: ObjectStore, seconds: float) -> Iterator[lease.Lease]:
    held = lease.acquire(store, seconds=seconds, wait=False)
    try:
        yield held
    finally:
        held.release()


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
