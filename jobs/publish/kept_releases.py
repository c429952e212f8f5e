"""Every release below a catalog's root, and which of them are kept, for `quantfleet gc`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.publish.releases import (
    Current,
    Release,
    find_current,
    history,
    published_releases,
)
from pipeline.storage.object_store import ObjectStore

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Every release below a catalog's root, read once; of each only what names its run is kept.

    Attributes:
        kept_runs: of the current releases and the newest.
        named_exports: the folders, below the root, of all exports that these name.
        published_as: of each other run, the names under which it may be promoted again.
        older: of each other run, its latest release in words.
    """

    kept_runs: frozenset[str]
    named_exports: frozenset[str]
    published_as: Mapping[str, frozenset[tuple[str, str]]]
    older: Mapping[str, str]

    @classmethod
    def read(cls, root: ObjectStore) -> Releases:
        """Read them; one listing finds all.

        Raises:
            DamagedObjectError: a release cannot be read, so what it refers to is unknown.
        """
        kept: set[str] = set()
        exports: set[str] = set()
        published_as: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        older: dict[str, str] = {}
        names = published_releases(root)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = pool.map(lambda one: _read(root, one, names[one]), names)
            for one, (current, past) in zip(names, found, strict=True):
                for release in _kept(current, past):
                    kept.add(release.run_id)
                    exports.update(export.folder for export in release.exports)
                for release in past:
                    published_as[release.run_id].add(one)
                    older[release.run_id] = (
                        f"release {release.number} of {release.model} in {release.recipe_name}, "
                        f"older than the {release.keep} that are kept"
                    )
        return cls(
            kept_runs=frozenset(kept),
            named_exports=frozenset(exports),
            published_as={run: frozenset(published_as[run]) for run in published_as.keys() - kept},
            older={run: older[run] for run in older.keys() - kept},
        )


def kept_now(root: ObjectStore, model: str, recipe_name: str) -> tuple[Release, ...]:
    """Of a model's and recipe's releases, the current one and the newest."""
    return _kept(find_current(root, model, recipe_name), history(root, model, recipe_name))


def _read(
    root: ObjectStore, names: tuple[str, str], keys: Sequence[str]
) -> tuple[Current | None, tuple[Release, ...]]:
    return find_current(root, *names), tuple(Release.read(root, key) for key in keys)


def _kept(current: Current | None, past: tuple[Release, ...]) -> tuple[Release, ...]:
    return () if current is None else (current.release, *past[-current.release.keep :])
