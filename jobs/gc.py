"""`quantfleet gc`: delete what no manifest, plan, release or running driver refers to."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from jobs.catalog.request import REQUESTS_PREFIX, RUNS_PREFIX, run_store
from jobs.logging import log_event, print_json, status
from jobs.publish.releases import (
    MODELS_PREFIX,
    Release,
    find_current,
    history,
    published_names,
)
from jobs.publish.verified_files import verified_files_key
from jobs.quantities import size
from pipeline.errors import PipelineError
from pipeline.export.manifest import EXPORT_KEY
from pipeline.export.settings import EXPORTS_PREFIX
from pipeline.run import lease
from pipeline.run.garbage import Garbage, find_garbage, find_runs, remove, whole_run
from pipeline.storage.object_store import ObjectStore, open_store


class _UnreferencedRun(NamedTuple):
    """A whole run below a catalog's root that may be deleted."""

    run_id: str
    reason: str
    published_as: frozenset[tuple[str, str]]
    """Models and recipes under which it may be promoted again."""


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """What was found in one run.

    Attributes:
        garbage: what is not needed.
        skipped: why it was not deleted, although it should have been.
    """

    url: str
    garbage: tuple[Garbage, ...] = ()
    deleted: bool = False
    skipped: str = ""


def collect(
    url: str, *, delete: bool, lease_seconds: float, as_json: bool, unpublished: bool = False
) -> None:
    """Find, and delete if asked, the garbage of the runs at and below a URL.

    At a catalog's root, that includes whole runs that its releases no longer refer to.

    Args:
        url: a run, or a folder of runs, or a catalog's root.
        lease_seconds: silence after which another driver of a run counts as dead.
        unpublished: include whole runs that were never published.

    Raises:
        PipelineError: no run is there.
    """
    root = open_store(url)
    is_catalog_root = bool(root.list(MODELS_PREFIX) or root.list(REQUESTS_PREFIX))
    unreferenced = _unreferenced_runs(root, unpublished=unpublished) if is_catalog_root else {}
    runs = {run.rstrip("/") for run in find_runs(root)}
    runs |= {f"{RUNS_PREFIX}{run_id}" for run_id in unreferenced}
    exports = _UnnamedExports(root) if is_catalog_root else None
    if not runs:
        raise PipelineError(f"{url}: no run is there or below it (no plan.json)")
    swept = []
    for run in sorted(runs):
        run_url = f"{root.root_url}/{run}".rstrip("/")
        whole = unreferenced.get(run.removeprefix(RUNS_PREFIX))
        with status(f"searching {run_url}"):
            try:
                store = open_store(run_url)
                swept.append(_sweep(root, store, whole, exports, delete, lease_seconds))
            except PipelineError as error:
                swept.append(SweptRun(url=run_url, skipped=str(error)))
    if as_json:
        print_json(swept)
        return
    log_event("swept", "", {"runs": list(map(dataclasses.asdict, swept))}, table=_table(swept))
    if not delete and any(one.garbage for one in swept):
        log_event("listed", "nothing was deleted; add --delete to delete it")


def _unreferenced_runs(root: ObjectStore, *, unpublished: bool) -> dict[str, _UnreferencedRun]:
    """Runs that neither the current nor one of the newest releases refers to, by id.

    A run that was never published may still be in progress, or kept to see why it failed its gate:
    it is included only if `unpublished`.

    Raises:
        DamagedObjectError: a release cannot be read, so what it refers to is unknown.
    """
    needed: set[str] = set()
    published_as: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    reasons: dict[str, str] = {}
    for names in published_names(root):
        needed |= _needed(root, names)
        for release in history(root, *names):
            published_as[release.run_id].add(names)
            reasons[release.run_id] = (
                f"release {release.number} of {release.model} in {release.recipe_name}, older "
                f"than the {release.keep} that are kept"
            )
    files: defaultdict[str, list[str]] = defaultdict(list)
    for key in root.list(RUNS_PREFIX):
        run_id, _, rest = key.removeprefix(RUNS_PREFIX).partition("/")
        files[run_id].append(rest)
    for run_id in files.keys() - reasons.keys():
        if all(name.startswith(lease.PREFIX) for name in files[run_id]):
            reasons[run_id] = "nothing was made here"
        elif unpublished:
            reasons[run_id] = "never published"
    return {
        run_id: _UnreferencedRun(run_id, reasons[run_id], frozenset(published_as[run_id]))
        for run_id in (files.keys() & reasons.keys()) - needed
    }


def _kept(root: ObjectStore, names: tuple[str, str]) -> tuple[Release, ...]:
    """A model's and recipe's current release and the newest ones."""
    current = find_current(root, *names)
    if current is None:
        return ()
    return (current.release, *history(root, *names)[-current.release.keep :])


def _needed(root: ObjectStore, names: tuple[str, str]) -> set[str]:
    """The runs of a model's and recipe's current release and of the newest ones."""
    return {release.run_id for release in _kept(root, names)}


# Of exports that `fulfil` makes; others were made by a person.
_EXPORT = re.compile(rf"({EXPORTS_PREFIX}[a-z-]+-[0-9a-f]{{12}})/")


@dataclass(frozen=True)
class _UnnamedExports:
    """The exports below a catalog's root that no release names which is kept."""

    root: ObjectStore

    def of(self, store: ObjectStore) -> tuple[Garbage, ...]:
        """Those of one run that was published; others may still be published.

        Raises:
            DamagedObjectError: a release cannot be read, so what it refers to is unknown.
        """
        found = {
            key: match[1] for key in store.list(EXPORTS_PREFIX) if (match := _EXPORT.match(key))
        }
        if not found:
            return ()
        kept = [r for names in published_names(self.root) for r in _kept(self.root, names)]
        if store.root_url not in {run_store(self.root, r.run_id).root_url for r in kept}:
            return ()
        named = {f"{self.root.root_url}/{export.folder}" for r in kept for export in r.exports}
        return tuple(
            Garbage(key=key, reason="export that no kept release names", size_bytes=store.size(key))
            # Each export.json first, so that no reader takes the rest for a finished export.
            for key in sorted(found, key=lambda key: (not key.endswith(f"/{EXPORT_KEY}"), key))
            if store.url(found[key]) not in named
        )


def _sweep(
    root: ObjectStore,
    store: ObjectStore,
    whole: _UnreferencedRun | None,
    exports: _UnnamedExports | None,
    delete: bool,
    lease_seconds: float,
) -> SweptRun:
    def garbage() -> tuple[Garbage, ...]:
        if whole is not None:
            return whole_run(store, whole.reason)
        return find_garbage(store) + (() if exports is None else exports.of(store))

    url = store.root_url
    if not delete:
        return SweptRun(url=url, garbage=garbage())
    with lease.acquire(store, seconds=lease_seconds, wait=False) as held:
        # A person may have promoted it since it was found.
        if whole and any(whole.run_id in _needed(root, names) for names in whole.published_as):
            return SweptRun(url=url, skipped="a release of it was made current meanwhile")
        # Listed under the lease: a running driver may still need what it has just written.
        found = garbage()
        for one in found:
            if whole is None or not one.key.startswith(lease.PREFIX):
                held.check()
                remove(store, one)
    if whole is not None:
        # The lease's own files go last; a run with leases alone would still be listed.
        for key in store.list(lease.PREFIX):
            store.delete(key)
        root.delete(verified_files_key(whole.run_id))
    return SweptRun(url=url, garbage=found, deleted=True)


def _table(swept: Sequence[SweptRun]) -> Table:
    table = Table("run", "what", "objects", "bytes", "")
    for one in swept:
        url = Text(one.url)
        if one.skipped:
            table.add_row(url, "", "", "", Text(f"skipped: {one.skipped}"))
            continue
        counts = Counter(garbage.reason for garbage in one.garbage)
        for reason, number in sorted(counts.items()):
            freed = sum(g.size_bytes for g in one.garbage if g.reason == reason)
            outcome = "deleted" if one.deleted else "can be deleted"
            table.add_row(url, Text(reason), str(number), size(freed), outcome)
        if not counts:
            table.add_row(url, "nothing", "0", size(0), "")
    return table
