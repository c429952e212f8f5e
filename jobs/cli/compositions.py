"""The `quantfleet` command that makes one result of several."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import options
from pipeline.evaluation.named_texts import parse_texts
from pipeline.executor.protocol import ComputeSpec

app = typer.Typer()


@app.command()
def compose(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders or URLs of finished runs that differ in their schemes alone."),
    ],
    output: Annotated[str, typer.Option(help="Folder or URL to write the composition to.")],
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits a weight of the blocks may take, as stored, with scales and all."),
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes that all weights files may take.")
    ] = None,
    measure_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts to measure each block's cost on, other than those to evaluate on; "
            "repeatable; default: the runs' calibration windows."
        ),
    ] = None,
    measure_windows: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Token windows to measure it on.")
    ] = 8,
    by_layers: Annotated[
        bool,
        typer.Option(
            "--by-layers",
            help="Let layers of a block come from several runs too, those that read one input "
            "together; whole blocks are kept where they measure better.",
        ),
    ] = False,
    evaluate_on: options.EvaluateOn = None,
    tasks: options.Tasks = None,
    chat: options.Chat = None,
    windows: options.Windows = 8,
    export: options.Export = None,
    like: options.Like = None,
    source: options.Source = None,
    address: options.Address = None,
    workers: options.Workers = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    accelerator: options.Accelerator = None,
    gpus_per_worker: options.GpusPerWorker = None,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    _patience: options.StoragePatience = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure, and print the choice and what other sizes would give; keep only what "
            "each block costs.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Make an artifact of a given size from the blocks of finished runs; nothing is solved."""
    from jobs.compose import ComposeJob
    from jobs.compose import compose as compose_runs
    from jobs.composition_texts import AskedTexts
    from jobs.execute import DriverOptions
    from pipeline.composition.target import Target

    job = ComposeJob(
        run_urls=tuple(runs),
        output_url=output,
        target=Target(bits=target_bits, num_bytes=target_bytes),
        source_url=source or "",
        by_layers=by_layers,
        asked=AskedTexts(
            measure_texts=tuple(measure_on or ()),
            measure_windows=measure_windows,
            evaluated_on=parse_texts(evaluate_on or ()),
            evaluation_windows=windows,
            tasks=tuple(tasks or ()),
            chat=chat,
        ),
        exports=options.exports_of(export or (), like),
        options=DriverOptions(wait=wait, lease_seconds=lease_seconds),
    )
    spec = ComputeSpec(
        workers=workers,
        threads=threads,
        device=device,
        accelerator=accelerator,
        gpus_per_worker=gpus_per_worker,
    )
    compose_runs(job, spec, address, dry_run=dry_run, as_json=as_json)
