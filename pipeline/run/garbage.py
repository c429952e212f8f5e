"""Garbage in a run's directory: objects that no reader and no resumed run can need.

Only what the pipeline itself writes is ever garbage. Unknown keys are left alone, and so is
everything that a manifest, a plan or a resumed run may still read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.run import activations, lease
from pipeline.run.commits import QUARANTINE_PREFIX, read_manifest
from pipeline.run.records import ARTIFACT_PREFIX, CODES_PREFIX, MANIFEST_KEY, RECORDS_PREFIX
from pipeline.storage.backend import Version
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
    plans = (key for key in store.stream() if key.rpartition("/")[2] == PLAN_KEY)
    return tuple(sorted(key.removesuffix(PLAN_KEY) for key in plans))


def find_garbage(
    store: ObjectStore, known: Mapping[str, Version] | None = None
) -> tuple[Garbage, ...]:
    """The garbage of the run at the store's root, by key.

    Hold the run's lease (see `pipeline.run.lease`) from here until it is deleted: an active driver
    writes objects that nothing refers to yet.

    Args:
        known: the run's files, if they are listed already.

    Raises:
        DamagedObjectError: plan or manifest cannot be read.
    """
    known = store.versions() if known is None else known
    found = [
        Garbage(key=key, reason=reason, size_bytes=known[key].size_bytes)
        for key, reason in _unneeded(store, tuple(known), read_plan(store))
    ]
    found += [
        Garbage(key=name, reason="left by an interrupted write", size_bytes=0, is_leftover=True)
        for name in store.leftovers()
    ]
    return tuple(found)


def whole_run(known: Mapping[str, Version], reason: str) -> tuple[Garbage, ...]:
    """A whole run, of such files, in the order in which to delete it.

    Manifests go first, so that no reader takes the rest for a finished run or export; the plan
    late, so that an interrupted deletion is found again; the leases last, since the caller holds
    one.
    """

    def order(key: str) -> tuple[int, str]:
        ranks = {MANIFEST_KEY: 0, PLAN_KEY: 2}
        rank = 0 if key.endswith("/export.json") else ranks.get(key, 1)
        return (3 if key.startswith(lease.PREFIX) else rank, key)

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


def _unneeded(store: ObjectStore, keys: Sequence[str], plan: Plan) -> Iterator[tuple[str, str]]:
    """Those of a run's keys whose objects are not needed, each with the reason."""
    finished = MANIFEST_KEY in keys
    named: set[str] = set()
    if finished:
        manifest = read_manifest(store)
        named = {*manifest.files, *manifest.records}
    latest = max((lease.epoch_of(k) for k in keys if k.startswith(lease.PREFIX)), default=0)
    kept = activations.needed(keys)
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
