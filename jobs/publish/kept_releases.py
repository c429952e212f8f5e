"""Every release below a catalog's root, and which of them are kept, for `quantfleet gc`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from jobs.publish.releases import Current, Release, find_current, history, published_names
from pipeline.storage.object_store import ObjectStore

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Every release below a catalog's root, read once.

    Attributes:
        kept: the current ones and the newest.
        published_as: of each run, the names under which it may be promoted again.
        older: of each run, its latest release in words.
    """

    kept: tuple[Release, ...]
    published_as: Mapping[str, frozenset[tuple[str, str]]]
    older: Mapping[str, str]

    @cached_property
    def kept_runs(self) -> frozenset[str]:
        return frozenset(release.run_id for release in self.kept)

    @cached_property
    def named_exports(self) -> frozenset[str]:
        """The folders, below the root, of all exports that kept releases name."""
        return frozenset(export.folder for release in self.kept for export in release.exports)

    @classmethod
    def read(cls, root: ObjectStore) -> Releases:
        """Read them.

        Raises:
            DamagedObjectError: a release cannot be read, so what it refers to is unknown.
        """
        kept: list[Release] = []
        published_as: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        older: dict[str, str] = {}
        names = published_names(root)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for one, (current, past) in zip(
                names, pool.map(lambda one: _releases_of(root, one), names), strict=True
            ):
                kept += _kept(current, past)
                for release in past:
                    published_as[release.run_id].add(one)
                    older[release.run_id] = (
                        f"release {release.number} of {release.model} in {release.recipe_name}, "
                        f"older than the {release.keep} that are kept"
                    )
        named = {run_id: frozenset(names) for run_id, names in published_as.items()}
        return cls(kept=tuple(kept), published_as=named, older=older)


def kept_now(root: ObjectStore, model: str, recipe_name: str) -> tuple[Release, ...]:
    """Of a model's and recipe's releases, the current one and the newest."""
    return _kept(*_releases_of(root, (model, recipe_name)))


def _releases_of(
    root: ObjectStore, names: tuple[str, str]
) -> tuple[Current | None, tuple[Release, ...]]:
    return find_current(root, *names), history(root, *names)


def _kept(current: Current | None, past: tuple[Release, ...]) -> tuple[Release, ...]:
    return () if current is None else (current.release, *past[-current.release.keep :])
