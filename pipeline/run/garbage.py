"""Garbage in a run's directory: objects that no reader and no resumed run can need.

Only what the pipeline itself writes is ever garbage. Unknown keys are left alone, and so is
everything that a manifest, a plan or a resumed run may still read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.run import activations, lease
from pipeline.run.commits import QUARANTINE_PREFIX, read_manifest
from pipeline.run.records import ARTIFACT_PREFIX, CODES_PREFIX, MANIFEST_KEY, RECORDS_PREFIX
from pipeline.storage.object_store import ObjectStore

_TOKENS_PREFIX = "tokens/"
_NAMED_PREFIXES = (ARTIFACT_PREFIX, CODES_PREFIX, RECORDS_PREFIX)
"""Of everything that a manifest names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Something to delete.

    Attributes:
        is_leftover: it is not an object, but the remains of an interrupted write (see
            `ObjectStore.sweep`).
    """

    key: str
    reason: str
    size_bytes: int
    is_leftover: bool = False


def find_runs(store: ObjectStore) -> tuple[str, ...]:
    """The prefixes of all runs, each ending in "/"; "" is a run at the store's root itself."""
    plans = (key for key in store.list() if key.rpartition("/")[2] == PLAN_KEY)
    return tuple(key.removesuffix(PLAN_KEY) for key in plans)


def find_garbage(store: ObjectStore) -> tuple[Garbage, ...]:
    """The garbage of the run at the store's root, by key.

    Hold the run's lease (see `pipeline.run.lease`) from here until it is deleted: an active driver
    writes objects that nothing refers to yet.

    Raises:
        DamagedObjectError: plan or manifest cannot be read.
    """
    found = [
        Garbage(key=key, reason=reason, size_bytes=store.size(key))
        for key, reason in _unneeded(store, read_plan(store))
    ]
    found += [
        Garbage(key=name, reason="left by an interrupted write", size_bytes=0, is_leftover=True)
        for name in store.leftovers()
    ]
    return tuple(found)


def whole_run(store: ObjectStore, reason: str) -> tuple[Garbage, ...]:
    """The whole run at the store's root, in the order in which to delete it.

    Manifests go first, so that no reader takes the rest for a finished run or export; the plan
    late, so that an interrupted deletion is found again; the leases last, since the caller holds
    one.
    """

    def order(key: str) -> tuple[int, str]:
        ranks = {MANIFEST_KEY: 0, PLAN_KEY: 2}
        rank = 0 if key.endswith("/export.json") else ranks.get(key, 1)
        return (3 if key.startswith(lease.PREFIX) else rank, key)

    known = store.versions()
    return tuple(
        Garbage(key=key, reason=reason, size_bytes=known[key].size_bytes)
        for key in sorted(known, key=order)
    )


def remove(store: ObjectStore, garbage: Garbage) -> None:
    """Delete it, if it still exists."""
    if garbage.is_leftover:
        store.sweep(garbage.key)
    else:
        store.delete(garbage.key)


def _unneeded(store: ObjectStore, plan: Plan) -> Iterator[tuple[str, str]]:
    """The keys of unneeded objects, each with the reason."""
    keys = store.list()
    finished = MANIFEST_KEY in keys
    named: set[str] = set()
    if finished:
        manifest = read_manifest(store)
        named = {*manifest.files, *manifest.records}
    latest = lease.find_latest(store).epoch
    kept = activations.needed(store)
    for key in keys:
        if key.startswith(QUARANTINE_PREFIX):
            yield key, "damaged, moved aside"
        elif key.startswith(lease.PREFIX) and lease.epoch_of(key) < latest:
            yield key, "lease of an earlier driver"
        elif key.startswith(_TOKENS_PREFIX) and (plan.tokens is None or key != plan.tokens.key):
            yield key, "tokens that the plan does not name"
        elif key.startswith(activations.PREFIX) and (finished or key not in kept):
            yield key, "activations that no resumed run needs"
        elif finished and key.startswith(_NAMED_PREFIXES) and key not in named:
            yield key, "not named by the manifest"
