"""What readers get: for each model and recipe a history of releases, one of them current.

models/<model>/<recipe>/history/000001.json   created once, never changed
models/<model>/<recipe>/current.json          replaced by compare-and-set; all that readers follow
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.catalog.entries import NAME_PATTERN
from jobs.catalog.request import Request, run_prefix, run_store
from jobs.publish.published_exports import PublishedExport, verify_published
from jobs.publish.verdict import JudgedRun, Verdict
from pipeline.errors import DamagedObjectError, MissingObjectError, ObjectExistsError, PipelineError
from pipeline.run import lease
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

MODELS_PREFIX = "models/"
_MAX_SET_ASIDE = 100
_MAX_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True)
class Release(JudgedRun):
    """One result under one name.

    Attributes:
        number: from 1, in the order of publication under this name.
        artifact: key, below the catalog's root, of the folder with its files.
        keep: how many of the newest releases keep their artifacts.
        exports: checkpoints of it for other runtimes; omitted where there are none.
    """

    number: int
    artifact: str
    keep: int
    exports: tuple[PublishedExport, ...] = ()

    def content(self) -> dict[str, Any]:
        values = super().content()
        if not self.exports:
            del values["exports"]  # older versions did not know them
        return values


@dataclass(frozen=True, kw_only=True)
class Current(StoredRecord):
    """Which release readers get.

    Attributes:
        moves: how often it was changed, so that no two versions have the same bytes.
        set_aside: runs that a person has replaced; they are not published again automatically.
    """

    release: Release
    moves: int
    set_aside: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        return super().content() | {"release": self.release.content()}


def release_prefix(model: str, recipe_name: str) -> str:
    """Where a model's releases in one recipe lie; raises PipelineError for invalid names."""
    for what, name in (("model", model), ("recipe", recipe_name)):
        if not re.fullmatch(NAME_PATTERN, name):
            raise PipelineError(
                f"{name[:100]!r} is not a valid {what} name: it must match {NAME_PATTERN}"
            )
    return f"{MODELS_PREFIX}{model}/{recipe_name}/"


def find_current(root: ObjectStore, model: str, recipe_name: str) -> Current | None:
    """The current release; None before the first.

    Raises:
        DamagedObjectError: current.json cannot be read.
    """
    try:
        return Current.read(root, f"{release_prefix(model, recipe_name)}current.json")
    except MissingObjectError:
        return None


def history(root: ObjectStore, model: str, recipe_name: str) -> tuple[Release, ...]:
    """All releases, oldest first.

    Raises:
        DamagedObjectError: one of them cannot be read.
    """
    keys = root.list(f"{release_prefix(model, recipe_name)}history/")
    return tuple(Release.read(root, key) for key in keys)


def newest_first(root: ObjectStore, model: str, recipe_name: str) -> Iterator[Release]:
    """Releases, each read when it is asked for.

    Raises:
        DamagedObjectError: one of them cannot be read.
    """
    keys = root.list(f"{release_prefix(model, recipe_name)}history/")
    return (Release.read(root, key) for key in reversed(keys))


def published_names(root: ObjectStore) -> tuple[tuple[str, str], ...]:
    """Every model and recipe below a root that has a current release, in order."""
    return tuple(published_releases(root))


def published_releases(root: ObjectStore) -> dict[tuple[str, str], list[str]]:
    """The keys of all releases, oldest first, of each model and recipe that has a current one."""
    currents: dict[tuple[str, str], list[str]] = {}
    pasts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for key in root.list(MODELS_PREFIX):
        match key.split("/"):
            case [_, model, recipe, "current.json"]:
                currents[model, recipe] = pasts[model, recipe]
            case [_, model, recipe, "history", _]:
                pasts[model, recipe].append(key)
    return currents


def publish(
    root: ObjectStore,
    request: Request,
    verdict: Verdict,
    exports: tuple[PublishedExport, ...] = (),
) -> tuple[Release, ...]:
    """Make a verified result that passed its gate the current release under all its names.

    Doing so twice, or from two processes, publishes once.

    Args:
        exports: of the result, verified too.
    """
    assert verdict.passed
    assert verdict.request_id == request.request_id
    releases = []
    for name in request.names:
        release = _add_release(root, name, request, verdict, exports)
        set_current(root, release)
        releases.append(release)
    return tuple(releases)


def _add_release(
    root: ObjectStore,
    name: str,
    request: Request,
    verdict: Verdict,
    exports: tuple[PublishedExport, ...],
) -> Release:
    """Add a result to a name's history, unless it is the newest entry already."""
    while True:
        past = history(root, name, request.recipe_name)
        number = past[-1].number + 1 if past else 1
        release = Release(
            number=number,
            model=name,
            recipe_name=request.recipe_name,
            request_id=request.request_id,
            run_id=verdict.run_id,
            artifact=f"{run_prefix(verdict.run_id)}artifact",
            plan_digest=verdict.plan_digest,
            manifest_sha256=verdict.manifest_sha256,
            source_bytes=verdict.source_bytes,
            stored_bytes=verdict.stored_bytes,
            quality=verdict.quality,
            gate=verdict.gate,
            keep=request.keep,
            exports=exports,
        )
        if past and dataclasses.replace(past[-1], number=number) == release:
            return past[-1]
        key = f"{release_prefix(name, request.recipe_name)}history/{number:06d}.json"
        try:
            root.create(key, release.to_json())
        except ObjectExistsError:  # another process took the number: try the next
            continue
        return release


def set_current(root: ObjectStore, release: Release, *, by_person: bool = False) -> Current:
    """Make a release the current one under its name, if it is not.

    Args:
        by_person: set the run that was current aside: a person chose another one over it.

    Raises:
        ObjectExistsError: other processes keep changing it.
    """
    key = f"{release_prefix(release.model, release.recipe_name)}current.json"
    for _ in range(_MAX_ATTEMPTS):
        found = find_current(root, release.model, release.recipe_name)
        if found is not None and found.release == release and not by_person:
            return found
        aside = () if found is None else found.set_aside
        if by_person and found is not None:
            aside = (*(run for run in aside if run != found.release.run_id), found.release.run_id)
        changed = Current(
            release=release,
            moves=1 if found is None else found.moves + 1,
            set_aside=tuple(run for run in aside if run != release.run_id)[-_MAX_SET_ASIDE:],
        )
        try:
            before = None if found is None else found.to_json()
            root.replace(key, changed.to_json(), expected=before)
        except (ObjectExistsError, MissingObjectError) as error:
            last = error
        else:
            return changed
    raise ObjectExistsError(
        f"{root.url(key)} changed {_MAX_ATTEMPTS} times while it was being updated; try again"
    ) from last


def promote(root: ObjectStore, model: str, recipe_name: str, run_id: str) -> Current:
    """Make the newest release of a run current.

    Raises:
        PipelineError: the run was never published under this name.
        DamagedObjectError: its artifact is damaged or deleted.
    """
    newest = {release.run_id: release for release in history(root, model, recipe_name)}
    if not newest:
        raise _never_published(root, model, recipe_name)
    if run_id not in newest:
        raise PipelineError(
            f"{root.root_url}: {run_id} was never published as {model} in {recipe_name}, so it "
            f"never passed that gate; choose one of {', '.join(newest)}"
        )
    return _promote_verified(root, newest[run_id])


def rollback(root: ObjectStore, model: str, recipe_name: str) -> Current:
    """Make the newest earlier release of another run current.

    Raises:
        PipelineError: there is none.
        DamagedObjectError: its artifact is damaged or deleted.
    """
    current = find_current(root, model, recipe_name)
    if current is None:
        raise _never_published(root, model, recipe_name)
    earlier = [
        release
        for release in history(root, model, recipe_name)
        if release.number < current.release.number and release.run_id != current.release.run_id
    ]
    if not earlier:
        raise PipelineError(
            f"{root.root_url}: {model} in {recipe_name} has no release before the current one, "
            f"{current.release.number}"
        )
    return _promote_verified(root, earlier[-1])


def _promote_verified(root: ObjectStore, release: Release) -> Current:
    """Read and hash all that a release consists of, and make it current."""
    store = run_store(root, release.run_id)
    with lease.acquire(store, wait=False):  # `quantfleet gc` needs it to delete the run
        try:
            manifest = read_manifest(store)
        except MissingObjectError:
            raise DamagedObjectError(
                f"{store.root_url}: the artifact of release {release.number} is gone; quantfleet "
                "gc or a person deleted it"
            ) from None
        if manifest.record_sha256 != release.manifest_sha256:
            raise DamagedObjectError(
                f"{store.url(manifest.key)} is not the manifest that was published as release "
                f"{release.number}"
            )
        if damaged := damaged_files(store, manifest):
            raise DamagedObjectError(
                f"{len(damaged)} objects of release {release.number} are damaged, the first: "
                f"{damaged[0].problem}"
            )
        for export in release.exports:
            verify_published(root, export)
        return set_current(root, release, by_person=True)


def _never_published(root: ObjectStore, model: str, recipe_name: str) -> PipelineError:
    return PipelineError(
        f"{root.root_url}: nothing was ever published as {model} in {recipe_name}; quantfleet "
        f"status {root.root_url} lists what was"
    )
