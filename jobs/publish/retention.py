"""Which runs below a catalog's root nobody needs any more, as its releases say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.catalog.request import RUNS_PREFIX
from jobs.publish.releases import find_current, history, published_pairs
from pipeline.run.lease import PREFIX as LEASES_PREFIX
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class Unneeded:
    """A run that may go.

    Attributes:
        run_id: its name below `runs/`.
        reason: why nobody needs it.
        pairs: models and recipes under which it was published, and may become current again.
    """

    run_id: str
    reason: str
    pairs: tuple[tuple[str, str], ...] = ()


def is_catalog_root(store: ObjectStore) -> bool:
    """Whether requests were made below it, or results published."""
    return bool(store.list("models/") or store.list("requests/"))


def unneeded_runs(root: ObjectStore, *, unpublished: bool) -> Mapping[str, Unneeded]:
    """Runs that no current release and none of the newest ones refers to, by run.

    A run that was never published may still be finished, or be looked at by whoever wonders why it
    did not pass its gate: it goes only if `unpublished`. Whoever deletes a run holds its lease, and
    asks `is_still_unneeded` then.

    Raises:
        DamagedObjectError: a release cannot be read, so that nobody can tell.
    """
    needed: set[str] = set()
    published: dict[str, list[tuple[str, str]]] = {}
    numbers: dict[str, str] = {}
    for pair in published_pairs(root):
        needed |= _needed(root, pair)
        for release in history(root, *pair):
            published.setdefault(release.run_id, []).append(pair)
            numbers[release.run_id] = (
                f"release {release.number} of {release.model} in {release.recipe_name}, older "
                f"than the {release.keep} that are kept"
            )
    keys: dict[str, list[str]] = {}
    for key in root.list(RUNS_PREFIX):
        run_id, _, rest = key.removeprefix(RUNS_PREFIX).partition("/")
        keys.setdefault(run_id, []).append(rest)
    found = {}
    for run_id, rests in keys.items():
        if run_id in needed:
            continue
        if run_id in published:
            pairs = tuple(dict.fromkeys(published[run_id]))
            found[run_id] = Unneeded(run_id=run_id, reason=numbers[run_id], pairs=pairs)
        elif all(rest.startswith(LEASES_PREFIX) for rest in rests):
            found[run_id] = Unneeded(run_id=run_id, reason="nothing was made here")
        elif unpublished:
            found[run_id] = Unneeded(run_id=run_id, reason="never published")
    return found


def is_still_unneeded(root: ObjectStore, run: Unneeded) -> bool:
    """Whether nobody made a release of the run current meanwhile."""
    return not any(run.run_id in _needed(root, pair) for pair in run.pairs)


def _needed(root: ObjectStore, pair: tuple[str, str]) -> set[str]:
    current = find_current(root, *pair)
    if current is None:
        return set()
    newest = history(root, *pair)[-current.release.keep :]
    return {current.release.run_id, *(release.run_id for release in newest)}
