"""`quantfleet gc`: delete what no manifest, plan, release or running driver refers to."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from jobs.catalog.entries import NAME_PATTERN
from jobs.catalog.request import REQUESTS_PREFIX, RUNS_PREFIX
from jobs.logging import log_event, print_json, status
from jobs.publish.kept_releases import Releases, kept_now
from jobs.publish.releases import MODELS_PREFIX
from jobs.publish.verified_files import verified_files_key
from jobs.quantities import size
from jobs.reachable import reachable
from pipeline.composition.auto_run import result_of_choice
from pipeline.errors import PipelineError, StorageError
from pipeline.export.manifest import EXPORT_KEY
from pipeline.export.settings import EXPORTS_PREFIX
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.plan import PLAN_KEY
from pipeline.run import lease
from pipeline.run.garbage import Garbage, find_garbage, find_runs, remove, whole_run
from pipeline.run.records import MANIFEST_KEY
from pipeline.run.statistics_users import holds_statistics, users
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore, open_store

_NUM_THREADS = 16
_RUNS_TOGETHER = 64
"""Listed together, and then held."""


class _UnreferencedRun(NamedTuple):
    """A whole run below a catalog's root that may be deleted."""

    run_id: str
    reason: str
    published_as: frozenset[tuple[str, str]]
    """Models and recipes under which it may be published or promoted meanwhile."""
    is_empty: bool = False
    """Whether there were leases alone."""
    is_statistics: bool = False
    """Not a run of the catalog, but statistics that no run uses any more."""
    choice_of: str | None = None
    """URL of the finished result that it is a choice of (see `pipeline.composition.auto_run`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
    url: str,
    *,
    delete: bool,
    lease_seconds: float,
    as_json: bool,
    unpublished: bool = False,
    statistics: bool = False,
    choices: bool = False,
) -> None:
    """Find, and delete if asked, the garbage of the runs at and below a URL.

    At a catalog's root, that includes whole runs that its releases no longer refer to.

    Args:
        url: a run, or a folder of runs, or a catalog's root.
        lease_seconds: silence after which another driver of a run counts as dead.
        unpublished: include whole runs that were never published.
        statistics: include statistics of which all runs that use them are finished.
        choices: include the choices' runs of finished results whose widths were chosen.

    Raises:
        PipelineError: no run is there.
    """
    root = reachable(url)
    is_catalog_root = any(
        True for prefix in (MODELS_PREFIX, REQUESTS_PREFIX) for _ in root.stream(prefix)
    )
    releases = Releases.read(root) if is_catalog_root else None
    unreferenced: dict[str, _UnreferencedRun] = {}
    if releases is None:
        runs = {run.rstrip("/") for run in find_runs(root)}
        if choices:
            unreferenced = dict(_choices_of_finished(root, runs))
    else:
        found = _catalog_runs(root)
        unreferenced = _unreferenced_runs(found, releases, unpublished=unpublished)
        runs = {f"{RUNS_PREFIX}{run_id}" for run_id, one in found.items() if one.is_planned}
        runs |= {f"{RUNS_PREFIX}{run_id}" for run_id in unreferenced}
    candidates = set(runs)
    if releases is not None:
        below = (key.split("/") for key in root.stream(f"{STATISTICS_FOLDER}/"))
        candidates = {"/".join(parts[:2]) for parts in below if len(parts) > 2}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        stores = {
            run: open_store(f"{root.root_url}/{run}".rstrip("/")) for run in sorted(candidates)
        }
        told = zip(stores, pool.map(holds_statistics, stores.values()), strict=True)
        shared = {run for run, is_statistics in told if is_statistics}
        if not runs | shared:
            raise PipelineError(f"{url}: no run is there or below it (no plan.json)")
        going = frozenset(
            f"{root.root_url}/{one.run_id if one.choice_of else f'{RUNS_PREFIX}{run_id}'}"
            for run_id, one in unreferenced.items()
        )
        use = _Use(going=going, unfinished=statistics)
        folders = sorted(shared)
        uses = pool.map(lambda folder: use.of(stores[folder]), folders)
        unreferenced |= {
            folder: _UnreferencedRun(folder, use.reason, frozenset(), is_statistics=True)
            for folder, is_used in zip(folders, uses, strict=True)
            if not is_used
        }
    sweep = _Sweep(
        root=root, releases=releases, use=use, delete=delete, lease_seconds=lease_seconds
    )
    swept: list[SweptRun] = []
    with status(f"searching {len(runs | shared)} runs"), ThreadPoolExecutor(_NUM_THREADS) as pool:
        # Statistics after all runs: those that are deleted then use them no longer.
        for group in (*_groups(sorted(runs - shared)), *_groups(sorted(shared))):
            # A run at the root itself is the only one.
            listed = {"": root.versions()} if group == [""] else _listed(root, group)
            swept += pool.map(
                lambda run, listed=listed: sweep.report(
                    run, listed[run], unreferenced.get(run.removeprefix(RUNS_PREFIX))
                ),
                group,
            )
    if as_json:
        print_json(swept)
        return
    log_event("swept", "", {"runs": list(map(dataclasses.asdict, swept))}, table=_table(swept))
    if not delete and any(one.garbage for one in swept):
        log_event("listed", "nothing was deleted; add --delete to delete it")


@dataclass(frozen=True, kw_only=True)
class _Use:
    """What counts as a use of statistics.

    Attributes:
        going: URLs of runs that are deleted too.
        unfinished: by runs that are not finished alone.
    """

    going: frozenset[str]
    unfinished: bool

    @property
    def reason(self) -> str:
        return f"statistics that no {'unfinished ' if self.unfinished else ''}run uses"

    def of(self, store: ObjectStore) -> bool:
        """Whether any run uses the statistics at a store's root, or will once others are gone.

        So it counts if that cannot be told.
        """
        try:
            return bool(users(store, unfinished=self.unfinished) - self.going)
        except StorageError as error:  # of where such a run is
            log_event("kept", f"{store.root_url}: {error}", level=logging.WARNING)
            return True

    def still_of(self, store: ObjectStore) -> bool:
        """Whether any run uses them now, be it one that was to be deleted and is still there."""
        return bool(users(store, unfinished=self.unfinished))


def _groups(runs: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs that are listed together; one at the root, which holds all others, alone."""
    below = [run for run in runs if run]
    if len(below) < len(runs):
        yield [""]
    for start in range(0, len(below), _RUNS_TOGETHER):
        yield below[start : start + _RUNS_TOGETHER]


def _listed(root: ObjectStore, runs: Sequence[str]) -> dict[str, Mapping[str, Version]]:
    """The files of each run."""
    found = root.folders(f"{run}/" for run in runs)
    return {prefix.removesuffix("/"): versions for prefix, versions in found}


@dataclass(slots=True)
class _FoundRun:
    """What the names of a run's files tell.

    Attributes:
        is_empty: whether there are leases alone.
    """

    is_planned: bool = False
    is_empty: bool = True


def _catalog_runs(root: ObjectStore) -> dict[str, _FoundRun]:
    """All runs of a catalog, by id; of a page of keys at a time nothing else is kept."""
    found: defaultdict[str, _FoundRun] = defaultdict(_FoundRun)
    for key in root.stream(RUNS_PREFIX):
        run_id, _, name = key.removeprefix(RUNS_PREFIX).partition("/")
        found[run_id].is_planned |= name == PLAN_KEY
        found[run_id].is_empty &= name.startswith(lease.PREFIX)
    return dict(found)


def _choices_of_finished(
    root: ObjectStore, runs: Iterable[str]
) -> Iterator[tuple[str, _UnreferencedRun]]:
    """The choices' runs, among those below a root, of which the result is made."""
    for run in sorted(runs):
        result = result_of_choice(run)
        if result is None:
            continue
        url = f"{root.root_url}/{result}".rstrip("/")
        if open_store(url).exists(MANIFEST_KEY):
            reason = "choice of a finished result"
            yield (
                run.removeprefix(RUNS_PREFIX),
                _UnreferencedRun(run, reason, frozenset(), choice_of=url),
            )


def _unreferenced_runs(
    runs: Mapping[str, _FoundRun], releases: Releases, *, unpublished: bool
) -> dict[str, _UnreferencedRun]:
    """Runs that neither the current nor one of the newest releases refers to, by id.

    A run that was never published may still be in progress, or kept to see why it failed its gate:
    it is included only if `unpublished`.
    """
    reasons: dict[str, str] = {}
    for run_id, found in runs.items():
        if run_id in releases.older:
            reasons[run_id] = releases.older[run_id]
        elif found.is_empty:
            reasons[run_id] = "nothing was made here"
        elif unpublished:
            reasons[run_id] = "never published"
    return {
        run_id: _UnreferencedRun(
            run_id,
            reason,
            releases.published_as.get(run_id) or _own_names(run_id),
            is_empty=runs[run_id].is_empty,
        )
        for run_id, reason in reasons.items()
        if run_id not in releases.kept_runs
    }


def _own_names(run_id: str) -> frozenset[tuple[str, str]]:
    """The models and recipes that may have given a run its id, MODEL-RECIPE-DIGEST.

    Aliases are not among them, but no run is published under these alone.
    """
    words = run_id.split("-")[:-1]
    pairs = (("-".join(words[:i]), "-".join(words[i:])) for i in range(1, len(words)))
    return frozenset(
        pair for pair in pairs if all(re.fullmatch(NAME_PATTERN, name) for name in pair)
    )


# Of exports that `fulfil` makes; others were made by a person.
_EXPORT = re.compile(rf"({EXPORTS_PREFIX}[a-z-]+-[0-9a-f]{{12}})/")


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """Finds, and deletes if asked, the garbage of one run after another.

    Attributes:
        releases: of the catalog, if it is one's root.
        use: by which statistics stay.
        lease_seconds: silence after which another driver of a run counts as dead.
    """

    root: ObjectStore
    releases: Releases | None
    use: _Use
    delete: bool
    lease_seconds: float

    def report(
        self, run: str, known: Mapping[str, Version], whole: _UnreferencedRun | None
    ) -> SweptRun:
        """Sweep one run; what cannot be is said.

        Args:
            known: its files.
        """
        url = f"{self.root.root_url}/{run}".rstrip("/")
        try:
            return self._sweep(open_store(url), known, whole)
        except PipelineError as error:
            return SweptRun(url=url, skipped=str(error))

    def _sweep(
        self, store: ObjectStore, known: Mapping[str, Version], whole: _UnreferencedRun | None
    ) -> SweptRun:
        found = self._garbage(store, known, whole, self.releases)
        if not self.delete or not (found or whole):
            return SweptRun(url=store.root_url, garbage=found, deleted=self.delete)
        with lease.acquire(store, seconds=self.lease_seconds, wait=False) as held:
            # It may have been promoted since it was found; or made, judged and published.
            now = [kept_now(self.root, *one) for one in whole.published_as] if whole else []
            if whole and any(r.run_id == whole.run_id for kept in now for r in kept):
                text = "a release of it was made current meanwhile"
                return SweptRun(url=store.root_url, skipped=text)
            if whole and whole.is_statistics and self.use.still_of(store):
                return SweptRun(url=store.root_url, skipped="a run still uses it")
            if whole and whole.choice_of and not open_store(whole.choice_of).exists(MANIFEST_KEY):
                return SweptRun(url=store.root_url, skipped="its result is not finished any more")
            # Listed under the lease: a running driver may still need what it has just written.
            known = store.versions()
            if whole and whole.is_empty and not all(key.startswith(lease.PREFIX) for key in known):
                return SweptRun(url=store.root_url, skipped="a run has begun here meanwhile")
            found = self._garbage(store, known, whole, self.releases)
            has_exports = any(one.key.startswith(EXPORTS_PREFIX) for one in found)
            if self.releases is not None and has_exports and whole is None:
                # Some may have been made and published since the releases were read.
                found = self._garbage(store, known, whole, Releases.read(self.root))
            for one in found:
                if whole is None or not one.key.startswith(lease.PREFIX):
                    held.check()
                    remove(store, one)
        if whole is not None:
            # The lease's own files go last; a run with leases alone would still be listed.
            for key in store.list(lease.PREFIX):
                store.delete(key)
            if not (whole.is_statistics or whole.choice_of):
                self.root.delete(verified_files_key(whole.run_id))
        return SweptRun(url=store.root_url, garbage=found, deleted=True)

    def _garbage(
        self,
        store: ObjectStore,
        known: Mapping[str, Version],
        whole: _UnreferencedRun | None,
        releases: Releases | None,
    ) -> tuple[Garbage, ...]:
        if whole is not None:
            return whole_run(known, whole.reason)
        found = find_garbage(store, known)
        run_id = store.root_url.removeprefix(f"{self.root.root_url}/{RUNS_PREFIX}")
        if releases is None or run_id not in releases.kept_runs:
            return found  # exports of a run that was not published yet may still be
        return found + _unnamed_exports(f"{RUNS_PREFIX}{run_id}/", known, releases)


def _unnamed_exports(
    prefix: str, known: Mapping[str, Version], releases: Releases
) -> tuple[Garbage, ...]:
    """Exports of a run, which lies at a prefix, that no kept release names."""
    folders = {key: match[1] for key in known if (match := _EXPORT.match(key))}
    return tuple(
        Garbage(
            key=key, reason="export that no kept release names", size_bytes=known[key].size_bytes
        )
        # Each export.json first, so that no reader takes the rest for a finished export.
        for key in sorted(folders, key=lambda key: (not key.endswith(f"/{EXPORT_KEY}"), key))
        if f"{prefix}{folders[key]}" not in releases.named_exports
    )


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
