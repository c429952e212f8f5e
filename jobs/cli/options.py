"""The options and arguments that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, get_args

import typer

from pipeline.errors import PipelineError
from pipeline.executor import protocol
from pipeline.export.code_formats import ExportFormat
from pipeline.export.settings import ExportSettings
from pipeline.storage.backend import PATIENCE_VARIABLE


def _set_patience(seconds: float | None) -> None:
    """For this process and all that it starts."""
    if seconds is not None:
        os.environ[PATIENCE_VARIABLE] = str(seconds)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, such as auto or 10.0.0.5:6379; default: start one."),
]
Dashboard = Annotated[
    str, typer.Option(help="Dashboard of the Ray cluster, such as http://head:8265.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Workers; default: one per node, or as many as its GPUs are enough for."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads per worker. They affect rounding, so the plan fixes them."),
]
Device = Annotated[protocol.Device, typer.Option(help="What workers compute on.")]
Accelerator = Annotated[
    str | None,
    typer.Option(help="Kind of GPU, as Ray names it, such as H100, if the cluster has several."),
]
GpusPerWorker = Annotated[
    int | None,
    typer.Option(
        min=1, help="GPUs of each worker, all of one node; by default as many as a node has."
    ),
]
EvaluateOn = Annotated[
    list[str] | None,
    typer.Option(
        help="Texts to evaluate on, other than the calibration texts, as URL, or as NAME=URL for "
        "figures of their own; repeatable."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Multiple-choice questions for source and result, in a .jsonl file; repeatable."
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Render conversations by the model's chat template, or take their contents alone.",
    ),
]
Windows = Annotated[
    int, typer.Option(min=1, max=1_000_000, help="Token windows of each set to evaluate on.")
]
Source = Annotated[str | None, typer.Option(help="The preset, if it has moved since.")]
KeepEvery = Annotated[
    int, typer.Option(min=1, help="Save activations to resume from after every so many blocks.")
]
Wait = Annotated[
    bool, typer.Option(help="Wait for another driver of the same run to end, or give up.")
]
LeaseSeconds = Annotated[
    float, typer.Option(min=1.0, help="Silence after which another driver counts as dead.")
]
StoragePatience = Annotated[
    float | None,
    typer.Option(
        "--storage-patience",
        callback=_set_patience,
        min=0.0,
        help="Seconds that storage may be unavailable before the run ends; default: 300.",
    ),
]
Export = Annotated[
    list[str] | None,
    typer.Option(help="Export the result too: compressed-tensors, gptq or dense; repeatable."),
]
Like = Annotated[
    str | None,
    typer.Option(help="Hugging Face folder of the model: exports take config and tokenizer of it."),
]
On = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: workers and machine to work the cost out for, such as 8xH100; "
        "default: those at hand."
    ),
]
Rates = Annotated[
    str | None,
    typer.Option(help="With --dry-run: a YAML file with rates and prices of machines."),
]
FinishedRun = Annotated[str, typer.Argument(help="Folder or URL of a finished run.")]
RunsOrFleet = Annotated[
    list[str],
    typer.Argument(
        help="A finished run or several, a catalog's file, or the URL of a catalog's root.",
        show_default=False,
    ),
]
CatalogFile = Annotated[str, typer.Argument(help="The catalog: a YAML file, or its URL.")]
Only = Annotated[list[str] | None, typer.Option(help="Only these models; repeatable.")]
CatalogRoot = Annotated[str, typer.Argument(help="URL of the catalog's root.")]
ModelName = Annotated[str, typer.Argument(help="The model's name in the catalog.")]
RecipeName = Annotated[str, typer.Argument(help="The recipe's name.")]


def exports_of(formats: Sequence[str], like: str | None) -> tuple[ExportSettings, ...]:
    """The exports that options ask for.

    Raises:
        PipelineError: an unknown format, or --like without one.
    """
    from jobs.reachable import absolute

    if like and not formats:
        raise PipelineError("--like is of an export; give --export compressed-tensors, say, too")
    known = {name: name for name in get_args(ExportFormat)}
    for name in formats:
        if name not in known:
            raise PipelineError(f"--export {name}: choose one of {', '.join(known)}")
    like_url = None if like is None else absolute(like)
    return tuple(
        ExportSettings(format=known[name], like_url=like_url) for name in dict.fromkeys(formats)
    )
