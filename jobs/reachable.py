"""Places that a user has just named: as any process finds them, and whether they can be used."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from pipeline.composition.auto_run import AutoRun
from pipeline.errors import DamagedObjectError, StorageError, StorageUrlError
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.run.commits import read_manifest
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.backend import Patience
from pipeline.storage.object_store import ObjectStore, open_store

_DEADLINE_SECONDS = 15.0


def absolute(url: str) -> str:
    """A local path as any process of this machine finds it; URLs as they are."""
    is_local = bool(url) and "://" not in url
    # Storage URLs hold no "..".
    return os.path.normpath(Path(url).expanduser().absolute()) if is_local else url


def reachable(url: str, key: str = PLAN_KEY) -> ObjectStore:
    """Open the store at a URL, and make sure that it answers, by asking for a key.

    During a run a store may be away for minutes (see `Patience`), but not when it is named.

    Raises:
        StorageError: it does not answer, or refuses.
    """
    patience = Patience.configured()
    soon = min(_DEADLINE_SECONDS, patience.deadline_seconds)
    open_store(url, dataclasses.replace(patience, deadline_seconds=soon)).exists(key)
    return open_store(url)


def finished_manifest(store: ObjectStore, run_url: str) -> Manifest:
    """The manifest of a run that is named as finished.

    Raises:
        DamagedObjectError: there is no run, it is not finished, or the manifest is damaged.
    """
    if store.exists(MANIFEST_KEY):
        return read_manifest(store)
    command = f"quantfleet resume {shlex.quote(run_url)}"
    has_choices = store.exists(AutoRun.key)
    if not has_choices and not store.exists(PLAN_KEY):
        raise DamagedObjectError(
            f"{run_url}: neither {MANIFEST_KEY} nor {PLAN_KEY} is there; name the folder that "
            "quantfleet quantize wrote to"
        )
    # A composition needs to be told of the runs that it is made of.
    if not has_choices and read_plan(store).composed:
        command = "the quantfleet compose that began it"
    raise DamagedObjectError(
        f"{store.url(MANIFEST_KEY)} is missing: the run is not finished; finish it with {command}"
    )


def check_writable(store: ObjectStore, what: str = "output") -> None:
    """Check that a folder on a local disk may be written, or made; object stores answer later.

    Args:
        what: the user is to choose another of.

    Raises:
        StorageUrlError: the kind of store keeps no runs.
        StorageError: the folder may not be written.
    """
    if not store.is_writable:
        protocol = store.root_url.partition("://")[0]
        raise StorageUrlError(
            f"{store.root_url}: {protocol}:// can only be read, as it has no create-once writes; "
            f"choose another {what}: a path, or s3://"
        )
    if not store.root_url.startswith("file://"):
        return
    path = Path(store.root_url.removeprefix("file://"))
    # What must be made lies in the last folder that is there.
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise StorageError(f"{path}: {nearest} is a file, not a folder; choose another {what}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(
            f"{path}: {nearest} cannot be written by this user, or is read-only; choose another "
            f"{what}, or change its permissions"
        )
