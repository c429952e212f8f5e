"""What readers get: for each model and recipe a history of releases, and which one is current.

models/<model>/<recipe>/history/000001.json   written once, never changed
models/<model>/<recipe>/current.json          moved by compare and set; all that readers follow
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from jobs.catalog.entries import NAME_PATTERN
from jobs.catalog.request import Request, run_prefix
from jobs.publish.verdict import Verdict
from pipeline.errors import MissingObjectError, ObjectExistsError, PipelineError
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

MODELS_PREFIX = "models/"
_MOST_SET_ASIDE = 100
_MOST_MOVES = 50


@dataclass(frozen=True, kw_only=True)
class Release(StoredRecord):
    """One result under one name.

    Attributes:
        number: from 1, in the order of publication under this name.
        request_id: what was asked for; its state lies at requests/<request_id>.json.
        run_id: the run that made it.
        artifact: key, below the catalog's root, under which its files lie.
        manifest_sha256: of the manifest that names all of them with their digests.
        source_bytes, stored_bytes: of the weights, before and after.
        quality, gate: what was measured, and the limits that it kept.
        keep: newest releases whose artifacts are kept.
    """

    number: int
    model: str
    recipe_name: str
    request_id: str
    run_id: str
    artifact: str
    plan_digest: str
    manifest_sha256: str
    source_bytes: int
    stored_bytes: int
    quality: dict[str, Any] | None
    gate: dict[str, Any] | None
    keep: int


@dataclass(frozen=True, kw_only=True)
class Current(StoredRecord):
    """Which release readers get.

    Attributes:
        release: that one.
        moves: how often it was moved, so that no two versions have the same bytes.
        set_aside: runs that a person moved away from; they are not published again by themselves.
    """

    release: Release
    moves: int
    set_aside: tuple[str, ...] = ()


def place_of(model: str, recipe_name: str) -> str:
    """The key under which a model's releases in one recipe lie.

    Raises:
        PipelineError: a name that is none.
    """
    for kind, name in (("model", model), ("recipe", recipe_name)):
        if not re.fullmatch(NAME_PATTERN, name):
            raise PipelineError(
                f"{name[:100]!r} is no name of a {kind}: it must match {NAME_PATTERN}"
            )
    return f"{MODELS_PREFIX}{model}/{recipe_name}/"


def find_current(root: ObjectStore, model: str, recipe_name: str) -> Current | None:
    """Which release is current; None before the first.

    Raises:
        DamagedObjectError: nobody can tell.
    """
    key = f"{place_of(model, recipe_name)}current.json"
    try:
        return Current.read(root, key)
    except MissingObjectError:
        return None


def history(root: ObjectStore, model: str, recipe_name: str) -> tuple[Release, ...]:
    """All releases, the oldest first.

    Raises:
        DamagedObjectError: one of them cannot be read.
    """
    keys = root.list(f"{place_of(model, recipe_name)}history/")
    return tuple(Release.read(root, key) for key in keys)


def publish(root: ObjectStore, request: Request, verdict: Verdict) -> tuple[Release, ...]:
    """Make a result that was verified, and passed its gate, current under all its names.

    Doing so twice, or from two places, publishes once.
    """
    assert verdict.passed
    assert verdict.request_id == request.request_id
    return tuple(_publish(root, name, request, verdict) for name in request.names)


def move(root: ObjectStore, model: str, release: Release, *, by_hand: bool) -> Current:
    """Make a release the current one, if it is not.

    Args:
        by_hand: a person decides: the run that was current is set aside.

    Raises:
        ObjectExistsError: others move it all the time.
    """
    key = f"{place_of(model, release.recipe_name)}current.json"
    for _ in range(_MOST_MOVES):
        found = find_current(root, model, release.recipe_name)
        if found is not None and found.release == release and not by_hand:
            return found
        aside = () if found is None else found.set_aside
        if by_hand and found is not None:
            aside = (*(run for run in aside if run != found.release.run_id), found.release.run_id)
        moved = Current(
            release=release,
            moves=1 if found is None else found.moves + 1,
            set_aside=tuple(run for run in aside if run != release.run_id)[-_MOST_SET_ASIDE:],
        )
        try:
            root.replace(key, moved.to_json(), expected=None if found is None else found.to_json())
        except (ObjectExistsError, MissingObjectError) as error:
            last = error
        else:
            return moved
    raise ObjectExistsError(f"{root.url(key)} is moved by others all the time") from last


def _publish(root: ObjectStore, name: str, request: Request, verdict: Verdict) -> Release:
    release = _entered(root, name, request, verdict)
    move(root, name, release, by_hand=False)
    return release


def _entered(root: ObjectStore, name: str, request: Request, verdict: Verdict) -> Release:
    """The history's entry of a result: the newest, if that is it, or a new one."""
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
        )
        if past and dataclasses.replace(past[-1], number=number) == release:
            return past[-1]
        key = f"{place_of(name, request.recipe_name)}history/{number:06d}.json"
        try:
            root.create(key, release.to_json())
        except ObjectExistsError:  # another was faster: the next number
            continue
        return release


def published_pairs(root: ObjectStore) -> tuple[tuple[str, str], ...]:
    """Every model and recipe below a root that has a current release, in order."""
    found = []
    for key in root.list(MODELS_PREFIX):
        parts = key.split("/")
        if len(parts) == 4 and parts[3] == "current.json":
            found.append((parts[1], parts[2]))
    return tuple(found)
