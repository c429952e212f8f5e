"""Exports of a release: made when its gate is passed, verified before it is published."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from jobs.catalog.request import Request, run_store
from jobs.execute import Compute, DriverOptions
from jobs.export import log_exported
from jobs.logging import status
from jobs.publish.published_exports import PublishedExport, verify_published
from jobs.publish.verified_files import VerifiedFiles
from jobs.run_exports import make_own_export
from pipeline.executor.protocol import FunctionRunner
from pipeline.export.description import MadeExport
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore


def release_exports(
    root: ObjectStore,
    request: Request,
    run_id: str,
    manifest: Manifest,
    compute_for: Callable[[ObjectStore], Compute],
    options: DriverOptions,
) -> tuple[PublishedExport, ...]:
    """Make what the request wants exported, or find it made, and read all of it once more.

    Each export lies in a folder of the run that is named for all that decides its bytes, so one
    with other settings is another one, and those of earlier releases stay as they are.

    Args:
        run_id, manifest: of the run whose artifact is released; it may be another one than the
            request's, with the same bytes.
        compute_for: what works on the run at a store's root.

    Raises:
        ExportError: a result that cannot be exported so.
        DamagedObjectError: something was damaged since it was written.
    """
    if not request.exports:
        return ()
    store = run_store(root, run_id)

    def make(runner: FunctionRunner) -> list[MadeExport]:
        return [make_own_export(runner, store, one) for one in request.exports]

    with contextlib.ExitStack() as stack:
        if run_id != request.run_id:
            # Another run's folder is written to: `quantfleet gc` is to leave it alone meanwhile.
            stack.enter_context(options.acquire_lease(store))
        with status("exporting, one block at a time"):
            made = compute_for(store).plan(make, with_workers=False)
        versions = store.versions()
        published = [PublishedExport.of(root, one) for one in made]
        manifests = {one: verify_published(root, one) for one in published}
        VerifiedFiles.of(run_id, manifest, versions, manifests).save(root)
    for one in made:
        log_exported(one)
    return tuple(published)
