"""`quantfleet export`: a finished result as a checkpoint for transformers, vLLM and others."""

from __future__ import annotations

import os
import re
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rich.table import Table
from rich.text import Text

from jobs.logging import log_event, print_json, print_result, status
from jobs.quantities import size
from jobs.reachable import finished_manifest, reachable
from jobs.release.cards import write_card
from jobs.release.contents import export_contents, read_run
from pipeline.errors import ExportError
from pipeline.export.code_formats import ExportFormat
from pipeline.export.manifest import forget_progress
from pipeline.export.settings import ExportDtype, ExportSettings
from pipeline.storage.object_store import open_store

if TYPE_CHECKING:
    from pipeline.export.description import ExportDescription, MadeExport
    from pipeline.export.kernels import ExportedTensor


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What to export, and how.

    Attributes:
        to_url: the folder to write; None for one below the run.
        dtype: of what is not quantized; None for the artifact's own.
        like_url: a Hugging Face folder to take config and tokenizer from.
    """

    run_url: str
    format: ExportFormat = "compressed-tensors"
    to_url: str | None = None
    dtype: str | None = None
    like_url: str | None = None

    def __post_init__(self) -> None:
        known = typing.get_args(ExportDtype)
        if self.dtype is not None and self.dtype not in known:
            raise ExportError(f"--dtype {self.dtype}: choose one of {', '.join(known)}")

    @property
    def settings(self) -> ExportSettings:
        dtype = cast("ExportDtype | None", self.dtype)  # checked above
        return ExportSettings(format=self.format, dtype=dtype, like_url=self.like_url)

    @property
    def target_url(self) -> str:
        return self.to_url or f"{self.run_url.rstrip('/')}/{self.settings.folder}"


def export_run(job: ExportJob, *, dry_run: bool, as_json: bool) -> None:
    """Write a finished run's artifact as a checkpoint, or say what would be written.

    Raises:
        DamagedObjectError: the run is not finished, or a file is not what was committed.
        ExportError: something that this format cannot hold.
    """
    # Imported here: JAX and Keras are slow to load. Without a choice Keras takes TensorFlow.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from pipeline.export import exporting
    from pipeline.export.description import ExportDescription

    run = reachable(job.run_url)
    finished_manifest(run, job.run_url)
    if dry_run:
        with status("finding where each tensor goes"):
            checkpoint = exporting.checkpoint_of_run(run, job.settings)
            described = ExportDescription.of(checkpoint)
        found = {"to": job.target_url, **described.facts(), "tensors": described.tensors}
        print_result(found, kernels_table(described.tensors), as_json=as_json)
        return
    with status("exporting, one block at a time"):
        made = exporting.export_run(run, job.settings, job.target_url)
        forget_progress(open_store(made.url))
        write_card(export_contents(read_run(run, job.run_url), open_store(made.url)))
    log_notes(made.description)
    if as_json:
        print_json(exported_json(made) | {"tensors": made.manifest.tensors})
    else:
        log_exported(made)


def exported_json(made: MadeExport) -> dict[str, object]:
    """What was written, as plain JSON values."""
    return {
        "to": made.url,
        **made.description.facts(),
        "files": len(made.manifest.files),
        "bytes": made.manifest.num_bytes,
    }


def log_exported(made: MadeExport) -> None:
    """Say what was written, in a line."""
    described = made.description
    kernels = "" if described.format == "dense" else f"; vLLM's kernels: {described.kernels}"
    log_event(
        "exported",
        f"{made.url.removeprefix('file://')}: {len(made.manifest.files)} files, "
        f"{size(made.manifest.num_bytes)}, {described.format}{kernels}",
        exported_json(made),
    )


def log_notes(*described: ExportDescription) -> None:
    """Say what a person should know before exports are served; each note once."""
    for note in dict.fromkeys(note for one in described for note in one.notes):
        log_event("note", note)


def kernels_table(tensors: Iterable[ExportedTensor], title: str | None = None) -> Table:
    """A line for what all blocks have in common."""
    columns = ("matrices", "modules", "scheme", "stored as", "vLLM's kernel", "because")
    table = Table(*columns, title=title)
    rows = Counter(
        (
            re.sub(r"\.\d+(?=\.|$)", ".*", row.module),
            *(row.scheme or "float", row.stored, row.kernel or "none", row.reason),
        )
        for row in tensors
    )
    for cells, number in rows.items():
        table.add_row(str(number), *map(Text, cells))
    return table
