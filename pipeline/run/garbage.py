"""What of a run's directory nobody needs any more.

Only what the pipeline itself writes is ever garbage. Keys that it does not know are left alone,
and so is everything that a manifest, a plan or a resumed run may still read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.run import activations, lease
from pipeline.run.commits import QUARANTINE_PREFIX, read_manifest
from pipeline.run.records import ARTIFACT_PREFIX, MANIFEST_KEY, RECORDS_PREFIX
from pipeline.storage.object_store import ObjectStore

_TOKENS_PREFIX = "tokens/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """An object that may go.

    Attributes:
        key: below the run's root.
        reason: why nobody needs it.
        size_bytes: what deleting it frees.
        is_leftover: it is no object, but what an interrupted write left (see `ObjectStore.sweep`).
    """

    key: str
    reason: str
    size_bytes: int
    is_leftover: bool = False


def find_runs(store: ObjectStore) -> tuple[str, ...]:
    """The keys below which runs lie, each ending in "/"; "" is the store's root itself."""
    plans = (key for key in store.list() if key.rpartition("/")[2] == PLAN_KEY)
    return tuple(key.removesuffix(PLAN_KEY) for key in plans)


def find_garbage(store: ObjectStore) -> tuple[Garbage, ...]:
    """What may go of the run at the store's root, by key.

    Whoever deletes it holds the run's lease (see `pipeline.run.lease`): a driver at work
    writes things that nothing refers to yet.

    Raises:
        DamagedObjectError: plan or manifest cannot be read, so that nobody can tell.
    """
    plan = read_plan(store)
    keys = store.list()
    unneeded = dict(_unneeded(store, plan, keys))
    found = [
        Garbage(key=key, reason=unneeded[key], size_bytes=store.size(key))
        for key in keys
        if key in unneeded
    ]
    found += [
        Garbage(key=name, reason="left by an interrupted write", size_bytes=0, is_leftover=True)
        for name in store.leftovers()
    ]
    return tuple(found)


def whole_run(store: ObjectStore, reason: str) -> tuple[Garbage, ...]:
    """All of the run at the store's root, in the order in which it is to be deleted.

    The manifest goes first, so that nobody takes the rest for whole; the plan late, so that what an
    interruption leaves is found again; and last the leases, one of which the deleter holds.
    """

    def turn(key: str) -> tuple[int, str]:
        ranks = {MANIFEST_KEY: 0, PLAN_KEY: 2}
        return (3 if key.startswith(lease.PREFIX) else ranks.get(key, 1), key)

    known = store.versions()
    return tuple(
        Garbage(key=key, reason=reason, size_bytes=known[key].size_bytes)
        for key in sorted(known, key=turn)
    )


def remove(store: ObjectStore, garbage: Garbage) -> None:
    """Delete it; somebody else may have been faster."""
    if garbage.is_leftover:
        store.sweep(garbage.key)
    else:
        store.delete(garbage.key)


def _unneeded(store: ObjectStore, plan: Plan, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    finished = MANIFEST_KEY in keys
    named: set[str] = set()
    if finished:
        manifest = read_manifest(store)
        named = {*manifest.files, *manifest.records}
    latest = lease.find_latest(store).epoch
    kept = activations.needed(store)
    for key in keys:
        if key.startswith(QUARANTINE_PREFIX):
            yield key, "damaged, and moved aside"
        elif key.startswith(lease.PREFIX) and lease.epoch_of(key) < latest:
            yield key, "of a driver that another followed"
        elif key.startswith(_TOKENS_PREFIX) and (plan.tokens is None or key != plan.tokens.key):
            yield key, "tokens of no plan"
        elif key.startswith(activations.PREFIX) and (finished or key not in kept):
            yield key, "activations that no resumed run needs"
        elif finished and key.startswith((ARTIFACT_PREFIX, RECORDS_PREFIX)) and key not in named:
            yield key, "not named by the manifest"
