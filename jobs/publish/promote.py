"""`quantfleet promote` and `rollback`: a person decides which release is current."""

from __future__ import annotations

from jobs.catalog.request import run_store
from jobs.publish.releases import Current, Release, find_current, history, move
from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError
from pipeline.run import lease
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.storage.object_store import ObjectStore


def promote(root: ObjectStore, model: str, recipe_name: str, run_id: str) -> Current:
    """Make the newest release of a run current.

    Raises:
        PipelineError: the run was never published under this name.
        DamagedObjectError: its artifact is not whole, or gone.
    """
    past = history(root, model, recipe_name)
    if not past:
        raise PipelineError(_nothing(root, model, recipe_name))
    chosen = next((release for release in reversed(past) if release.run_id == run_id), None)
    if chosen is None:
        runs = list(dict.fromkeys(release.run_id for release in past))
        raise PipelineError(
            f"{root.root_url}: {run_id} was never published as {model} in {recipe_name}, so it "
            f"did not pass its gate there; choose one of {', '.join(runs)}"
        )
    return _checked_move(root, model, chosen)


def rollback(root: ObjectStore, model: str, recipe_name: str) -> Current:
    """Make the newest release before the current one current that another run made.

    Raises:
        PipelineError: there is none.
        DamagedObjectError: its artifact is not whole, or gone.
    """
    current = find_current(root, model, recipe_name)
    if current is None:
        raise PipelineError(_nothing(root, model, recipe_name))
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
    return _checked_move(root, model, earlier[-1])


def _checked_move(root: ObjectStore, model: str, release: Release) -> Current:
    """Under the run's lease, which `quantfleet gc` needs to delete it."""
    store = run_store(root, release.run_id)
    with lease.acquire(store, wait=False):
        verify_release(root, release)
        return move(root, model, release, by_hand=True)


def verify_release(root: ObjectStore, release: Release) -> None:
    """Read and hash everything that a release's manifest names, and the manifest.

    Raises:
        DamagedObjectError: something is not as it was when it was published.
    """
    store = run_store(root, release.run_id)
    try:
        manifest = read_manifest(store)
    except MissingObjectError:
        raise DamagedObjectError(
            f"{store.root_url}: the artifact of release {release.number} is gone; it was collected "
            "by quantfleet gc, or deleted by hand"
        ) from None
    if manifest.record_sha256 != release.manifest_sha256:
        raise DamagedObjectError(
            f"{store.url(manifest.key)} is not the one that was published as release "
            f"{release.number}"
        )
    damaged = damaged_files(store, manifest)
    if damaged:
        raise DamagedObjectError(
            f"{len(damaged)} objects of release {release.number} are damaged, the first: "
            f"{damaged[0].problem}"
        )


def _nothing(root: ObjectStore, model: str, recipe_name: str) -> str:
    return (
        f"{root.root_url}: nothing was ever published as {model} in {recipe_name}; quantfleet "
        f"status {root.root_url} shows what was"
    )
