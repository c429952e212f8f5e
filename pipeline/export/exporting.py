"""Export a finished run, from its own files and what a person asks for."""

from __future__ import annotations

from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.description import ExportDescription, MadeExport
from pipeline.export.manifest import ExportRequest
from pipeline.export.settings import ExportSettings
from pipeline.export.writing import export_request, write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.run.commits import read_manifest
from pipeline.run.records import ARTIFACT_PREFIX
from pipeline.storage.object_store import ObjectStore, open_store


def checkpoint_of_run(run: ObjectStore, settings: ExportSettings) -> Checkpoint:
    """Plan the export of a finished run.

    Raises:
        ExportError: something that this format cannot hold.
        PipelineError: the run, or a folder that is named, cannot be used.
    """
    return plan_checkpoint(
        read_plan(run),
        read_preset(f"{run.root_url}/{ARTIFACT_PREFIX.rstrip('/')}"),
        settings.format,
        dtype=settings.dtype,
        like_url=settings.like_url,
    )


def request_of(run: ObjectStore, settings: ExportSettings) -> ExportRequest:
    """Everything that decides the bytes of a finished run's export.

    Raises:
        PipelineError: as `export_run`.
    """
    return export_request(checkpoint_of_run(run, settings), read_manifest(run))


def export_run(run: ObjectStore, settings: ExportSettings, to_url: str) -> MadeExport:
    """Write the export of a finished run, or go on with it, one part in memory at a time.

    Raises:
        ExportError: something that this format cannot hold.
        PlanMismatchError: the folder holds something else.
        DamagedObjectError: the run is not finished, or a file is not what was committed.
    """
    manifest = read_manifest(run)
    checkpoint = checkpoint_of_run(run, settings)
    store = open_store(to_url)
    made = write_checkpoint(checkpoint, run, manifest, store)
    return MadeExport(
        url=store.root_url, description=ExportDescription.of(checkpoint), manifest=made
    )
