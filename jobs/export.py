"""`quantfleet export`: a finished result as a checkpoint for transformers, vLLM and others."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from jobs.logging import log_event, print_json, print_result, status
from jobs.quantities import size
from jobs.reachable import finished_manifest
from pipeline.errors import ExportError
from pipeline.plan import read_plan
from pipeline.run.records import ARTIFACT_PREFIX
from pipeline.storage.object_store import ObjectStore, open_store

if TYPE_CHECKING:
    from pipeline.export.checkpoint import Checkpoint
    from pipeline.export.code_formats import ExportFormat
    from pipeline.export.kernels import ExportedTensor

_DTYPES = ("float32", "float16", "bfloat16")


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
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ExportError(f"--dtype {self.dtype}: choose one of {', '.join(_DTYPES)}")

    @property
    def target_url(self) -> str:
        return self.to_url or f"{self.run_url.rstrip('/')}/exports/{self.format}"


def export_run(job: ExportJob, *, dry_run: bool, as_json: bool) -> None:
    """Write a finished run's artifact as a checkpoint, or say what would be written.

    Raises:
        DamagedObjectError: the run is not finished, or a file is not what was committed.
        ExportError: something that this format cannot hold.
    """
    # Imported here: JAX and Keras are slow to load. Without a choice Keras takes TensorFlow.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from pipeline.export.checkpoint import plan_checkpoint
    from pipeline.export.writing import write_checkpoint
    from pipeline.model.preset import read_preset

    run = open_store(job.run_url)
    manifest = finished_manifest(run, job.run_url)
    with status("finding where each tensor goes"):
        checkpoint = plan_checkpoint(
            read_plan(run),
            read_preset(f"{run.root_url}/{ARTIFACT_PREFIX.rstrip('/')}"),
            job.format,
            dtype=job.dtype,
            like_url=job.like_url,
        )
    tensors = checkpoint.report()
    if dry_run:
        found = {"to": job.target_url, **_described(checkpoint), "tensors": tensors}
        print_result(found, _table(tensors), as_json=as_json)
        return
    for note in _notes(checkpoint):
        log_event("note", note)
    store = open_store(job.target_url)
    with status("exporting, one block at a time"):
        made = write_checkpoint(checkpoint, run, manifest, store)
    summary = {
        "to": store.root_url,
        **_described(checkpoint),
        "files": len(made.files),
        "bytes": made.num_bytes,
        "tensors": made.tensors,
    }
    if as_json:
        print_json(summary)
    else:
        kernels = ", ".join(f"{name} ({count})" for name, count in _kernels(made.tensors).items())
        log_event(
            "exported",
            f"{_path(store)}: {len(made.files)} files, {size(made.num_bytes)}, {job.format}; "
            f"vLLM's kernels: {kernels}",
            {key: value for key, value in summary.items() if key != "tensors"},
        )


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "format": checkpoint.format,
        "dtype": str(checkpoint.dtype),
        "config_from": checkpoint.config.folder.url,
        "tokenizer": bool(_tokenizer_files(checkpoint)),
    }


def _tokenizer_files(checkpoint: Checkpoint) -> list[str]:
    named = ("tokenizer", "vocab", "merges")
    return [name for name in checkpoint.config.small_files() if name.startswith(named)]


def _notes(checkpoint: Checkpoint) -> Iterable[str]:
    """What a person should know before the export is served."""
    config = checkpoint.config
    if config.made:
        yield (
            "config.json is the one that KerasHub writes, without a tokenizer, since the source is "
            "no Hugging Face folder, or is gone; name one of this model with --like for both"
        )
    elif not _tokenizer_files(checkpoint):
        yield f"no tokenizer is exported, since {config.folder.url} has none; copy it there"
    if checkpoint.format == "dense":
        return
    reasons = Counter(row.reason for row in checkpoint.report() if row.reason)
    for reason, number in reasons.items():
        yield f"{number} of the checkpoint's matrices: {reason}"


def _kernels(tensors: Iterable[ExportedTensor]) -> Counter[str]:
    return Counter(row.kernel or "none" for row in tensors)


def _table(tensors: Iterable[ExportedTensor]) -> Table:
    """A line for what all blocks have in common."""
    table = Table("matrices", "modules", "scheme", "stored as", "vLLM's kernel", "because")
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


def _path(store: ObjectStore) -> str:
    return store.root_url.removeprefix("file://")
