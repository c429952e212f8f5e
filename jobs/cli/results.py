"""The `quantfleet` commands about what a run has made."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import options
from pipeline.export.code_formats import ExportFormat

app = typer.Typer()


@app.command()
def verify(
    output: options.FinishedRun,
    stock: Annotated[
        bool, typer.Option(help="Also load and run it with stock KerasHub, in a fresh process.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Check every file of a finished result, and that stock KerasHub loads it."""
    from jobs.verify import verify_run

    verify_run(output, stock=stock, as_json=as_json)


@app.command()
def export(
    output: options.FinishedRun,
    to: Annotated[
        str | None,
        typer.Option(help="Folder or URL to write to; default: exports/FORMAT in the run."),
    ] = None,
    export_format: Annotated[
        ExportFormat,
        typer.Option("--format", help="dense stores all weights in float, for any scheme."),
    ] = "compressed-tensors",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16 for all else; default: the artifact's."),
    ] = None,
    like: options.Like = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a finished result as a checkpoint for transformers, vLLM and others."""
    from jobs.export import ExportJob, export_run

    job = ExportJob(run_url=output, format=export_format, to_url=to, dtype=dtype, like_url=like)
    export_run(job, dry_run=dry_run, as_json=as_json)


@app.command()
def card(
    output: options.FinishedRun,
    to: Annotated[
        str | None,
        typer.Option(help="Folder or URL of an export of the run: write only its card."),
    ] = None,
    base_model: Annotated[
        str, typer.Option(help="Repository of the source on the hub, as owner/name.")
    ] = "",
    license_id: Annotated[
        str,
        typer.Option("--license", help="The hub's name of the license, if the source tells none."),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also cards that a person has edited.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write README.md, a model card, and eval.json of a finished result and its exports."""
    from jobs.release.cards import card_run
    from jobs.release.model_card import CardSettings

    settings = CardSettings(base_model=base_model, license=license_id)
    card_run(output, to, settings, overwrite=overwrite, as_json=as_json)


@app.command()
def report(
    outputs: options.RunsOrFleet,
    to: Annotated[
        str | None,
        typer.Option(help="Write the page to this file instead of into the run, or the fleet."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a page for any browser: of a finished result, of several side by side, or of a fleet.

    Several need --to, since their page belongs to none of them.
    """
    from jobs.fleet.fleet_report import find_fleet, report_fleet
    from jobs.report.run_report import compare_runs, report_run

    if len(outputs) > 1:
        compare_runs(outputs, to, as_json=as_json)
        return
    [output] = outputs
    fleet = find_fleet(output)
    if fleet is None:
        report_run(output, to, as_json=as_json)
    else:
        report_fleet(*fleet, to, as_json=as_json)


@app.command()
def push(
    output: options.FinishedRun,
    repository: Annotated[str, typer.Argument(help="hf://owner/name; it is made if need be.")],
    export_name: Annotated[
        str,
        typer.Option(
            "--export", help="artifact, the format of an export below the run, or its folder."
        ),
    ] = "artifact",
    private: Annotated[
        bool, typer.Option("--private", help="Nobody else may see the repository.")
    ] = False,
    revision: Annotated[str, typer.Option(help="The branch; it is made if need be.")] = "main",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Send a finished result, with card and eval.json, to a repository of the Hugging Face hub."""
    from jobs.push import PushJob, push_run

    job = PushJob(
        run_url=output,
        repository_url=repository,
        what=export_name,
        private=private,
        revision=revision,
    )
    push_run(job, dry_run=dry_run, as_json=as_json)


@app.command()
def gc(
    url: Annotated[
        str, typer.Argument(help="A run, a folder with runs below it, or a catalog's root.")
    ],
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is found; it is only listed otherwise.")
    ] = False,
    unpublished: Annotated[
        bool,
        typer.Option(
            "--unpublished", help="At a catalog's root: also runs that were never published."
        ),
    ] = False,
    statistics: Annotated[
        bool,
        typer.Option("--statistics", help="Also statistics that only finished runs have used."),
    ] = False,
    choices: Annotated[
        bool,
        typer.Option("--choices", help="Also the runs of widths that a finished result is of."),
    ] = False,
    lease_seconds: options.LeaseSeconds = 60.0,
    as_json: options.Json = False,
) -> None:
    """List, or delete, what no manifest, plan, release or running driver refers to."""
    from jobs.gc import collect

    collect(
        url,
        delete=delete,
        lease_seconds=lease_seconds,
        as_json=as_json,
        unpublished=unpublished,
        statistics=statistics,
        choices=choices,
    )
