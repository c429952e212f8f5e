"""Finished runs of a catalog whose every file was just read and found whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jobs.catalog.request import Request, run_store
from jobs.fleet.known_quality import judged_request
from jobs.publish.releases import find_current
from jobs.publish.verdict import find_verdict
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.plan import Plan, read_plan
from pipeline.run.commits import Finding, damaged_files, read_manifest
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class IntactRun:
    """A finished run, found intact.

    Attributes:
        solved: whether it was made just now.
        driven_seconds: from its claim to its manifest, if it was quantized just now.
    """

    run_id: str
    plan: Plan
    manifest: Manifest
    solved: bool = False
    driven_seconds: float | None = None


def find_intact(root: ObjectStore, request: Request) -> IntactRun | None:
    """The finished and intact artifact of the request's own run, or of one with the same bytes."""
    found = map(partial(intact, root), dict.fromkeys(_candidates(root, request)))
    return next(filter(None, found), None)


def intact(root: ObjectStore, run_id: str, plan: Plan | None = None) -> IntactRun | None:
    """A run, if it is finished and intact.

    Args:
        plan: its own, if it is known already.
    """
    store = run_store(root, run_id)
    manifest, _ = read_intact(store)
    if manifest is None:
        return None
    return IntactRun(run_id=run_id, plan=plan or read_plan(store), manifest=manifest)


def read_intact(store: ObjectStore) -> tuple[Manifest | None, tuple[Finding, ...]]:
    """A run's manifest, once all files that it names were read and are intact; else what is not."""
    try:
        manifest = read_manifest(store)
    except MissingObjectError:
        return None, ()
    except DamagedObjectError as error:
        return None, (Finding(key=MANIFEST_KEY, problem=str(error), is_damaged=True),)
    damaged = damaged_files(store, manifest)
    return (None, damaged) if damaged else (manifest, ())


def _candidates(root: ObjectStore, request: Request) -> Iterator[str]:
    """Runs whose artifacts have the bytes that the request asks for."""
    yield request.run_id
    verdict = find_verdict(root, request.request_id)
    if verdict is not None:
        yield verdict.run_id
    current = find_current(root, request.model, request.recipe_name)
    if current is not None:
        before = judged_request(root, current.release)
        if before is not None and before.run_id == request.run_id:
            yield current.release.run_id
