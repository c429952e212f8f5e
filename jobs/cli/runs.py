"""The `quantfleet` commands that make a run's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.cli import options
from pipeline.errors import PipelineError
from pipeline.evaluation.named_texts import parse_texts
from pipeline.executor.protocol import ComputeSpec

if TYPE_CHECKING:
    from pipeline.recipe.auto_recipe import AnyRecipe

app = typer.Typer()


@app.command()
def quantize(
    preset: Annotated[
        str, typer.Argument(help="Folder or URL of a KerasHub preset, or a plain .keras file.")
    ],
    recipe: Annotated[str, typer.Option(help="Name of a built-in recipe, or a YAML file.")],
    output: Annotated[str, typer.Option(help="Folder or URL to write the run to.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on these texts instead of the recipe's; repeatable."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on an array, as NAME=FILE.npy; one for each input."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration windows, instead of the recipe's.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window, instead of the recipe's.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of what stays in float, instead of the model's own."),
    ] = None,
    allow_partial: Annotated[
        bool,
        typer.Option(
            "--allow-partial",
            help="Quantize what can be, even if it is less than half of what the recipe asks for.",
        ),
    ] = False,
    evaluate_on: options.EvaluateOn = None,
    tasks: options.Tasks = None,
    chat: options.Chat = None,
    windows: options.Windows = 8,
    export: options.Export = None,
    like: options.Like = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of the statistics that runs of a recipe with statistics: float "
            "share; by default below the output."
        ),
    ] = None,
    address: options.Address = None,
    workers: options.Workers = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    accelerator: options.Accelerator = None,
    gpus_per_worker: options.GpusPerWorker = None,
    keep_every: options.KeepEvery = 8,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    _patience: options.StoragePatience = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")
    ] = False,
    on: options.On = None,
    rates: options.Rates = None,
    as_json: options.Json = False,
) -> None:
    """Quantize one model by one recipe, or continue where an earlier attempt stopped."""
    is_file = preset.endswith(".keras")
    if is_file:
        from jobs.quantize_file import refuse_options

        refuse_options(
            preset,
            {
                "--texts": texts,
                "--sequence-length": sequence_length,
                "--evaluate-on": evaluate_on,
                "--tasks": tasks,
                "--export": export,
                "--statistics": statistics,
                "--address": address,
                "--workers": workers,
                "--accelerator": accelerator,
                "--gpus-per-worker": gpus_per_worker,
                "--on": on,
                "--rates": rates,
            },
        )
    from jobs.execute import DriverOptions
    from jobs.quantize import Job, run_job
    from jobs.run_costs import PricedMachine, refuse_without_dry_run
    from pipeline.recipe.auto_recipe import AutoRecipe

    refuse_without_dry_run(on, rates, dry_run=dry_run)
    priced = PricedMachine.of(on, rates, gpus_per_worker) if dry_run else None
    judged_on = parse_texts(evaluate_on or ())
    job = Job(
        source_url=preset,
        output_url=output,
        evaluation_texts=judged_on.texts,
        evaluation_sets=judged_on.sets,
        evaluation_windows=windows,
        tasks=tuple(tasks or ()),
        chat=chat,
        exports=options.exports_of(export or (), like),
        statistics_url=statistics or "",
        options=DriverOptions(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )
    spec = ComputeSpec(
        workers=workers,
        threads=threads,
        device=device,
        accelerator=accelerator,
        gpus_per_worker=gpus_per_worker,
    )
    changed = _recipe(recipe, texts, num_samples, sequence_length, chat)
    if dtype is not None:
        changed = changed.model_copy(update={"dtype": dtype})
    if allow_partial:
        changed = changed.model_copy(update={"allow_partial": True})
    if inputs:
        changed = _with_inputs(changed, inputs, keep_texts=not is_file)
    if isinstance(changed, AutoRecipe):
        from jobs.auto_quantize import run_auto

        if is_file:
            raise PipelineError(
                f"recipe {changed.name}: mode: auto chooses the width of each block of a preset, "
                f"and the blocks of a plain Keras model, {preset}, are not known; give its scheme "
                "mode: gptq and weight_bits"
            )
        run_auto(job, changed, spec, address, as_json=as_json, dry_run=priced)
        return
    if is_file:
        from jobs.quantize_file import run_file

        run_file(preset, output, changed, spec, as_json=as_json, dry_run=dry_run)
        return
    run_job(job, changed, spec, address, as_json=as_json, dry_run=priced)


@app.command()
def resume(
    output: Annotated[str, typer.Argument(help="Folder or URL of the run.")],
    source: options.Source = None,
    evaluate_on: options.EvaluateOn = None,
    tasks: options.Tasks = None,
    chat: options.Chat = None,
    windows: options.Windows = 8,
    address: options.Address = None,
    workers: options.Workers = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    accelerator: options.Accelerator = None,
    gpus_per_worker: options.GpusPerWorker = None,
    keep_every: options.KeepEvery = 8,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    _patience: options.StoragePatience = None,
    as_json: options.Json = False,
) -> None:
    """Continue a run from its last committed block, then evaluate its result if asked to."""
    from jobs.auto_quantize import resume_auto
    from jobs.execute import DriverOptions
    from jobs.quantize import Job, resume_job

    judged_on = parse_texts(evaluate_on or ())
    job = Job(
        source_url=source or "",
        output_url=output,
        evaluation_texts=judged_on.texts,
        evaluation_sets=judged_on.sets,
        evaluation_windows=windows,
        tasks=tuple(tasks or ()),
        chat=chat,
        options=DriverOptions(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )
    spec = ComputeSpec(
        workers=workers,
        threads=threads,
        device=device,
        accelerator=accelerator,
        gpus_per_worker=gpus_per_worker,
    )
    if not resume_auto(job, spec, address, as_json=as_json):
        resume_job(job, spec, address, as_json=as_json)


@app.command()
def evaluate(
    output: options.FinishedRun,
    evaluate_on: options.EvaluateOn = None,
    tasks: options.Tasks = None,
    chat: options.Chat = None,
    windows: options.Windows = 8,
    source: options.Source = None,
    address: options.Address = None,
    workers: options.Workers = None,
    device: options.Device = "auto",
    accelerator: options.Accelerator = None,
    gpus_per_worker: options.GpusPerWorker = None,
    as_json: options.Json = False,
) -> None:
    """Compare a finished result with its source, on texts, multiple-choice questions or both."""
    from jobs.quantize import Job, resume_job

    if not evaluate_on and not tasks:
        raise PipelineError(
            "nothing to evaluate on; give --evaluate-on texts.jsonl, or --tasks questions.jsonl"
        )
    judged_on = parse_texts(evaluate_on or ())
    job = Job(
        source_url=source or "",
        output_url=output,
        evaluation_texts=judged_on.texts,
        evaluation_sets=judged_on.sets,
        evaluation_windows=windows,
        tasks=tuple(tasks or ()),
        chat=chat,
    )
    spec = ComputeSpec(
        workers=workers, device=device, accelerator=accelerator, gpus_per_worker=gpus_per_worker
    )
    resume_job(job, spec, address, as_json=as_json, must_be_finished=True)


def _recipe(
    name: str,
    texts: Sequence[str] | None,
    num_samples: int | None,
    sequence_length: int | None,
    chat: bool | None,
) -> AnyRecipe:
    from pipeline.recipe.recipe_file import any_recipe_from_dict, load_recipe

    recipe = load_recipe(name)
    given = {
        "texts": texts or None,
        "num_samples": num_samples,
        "sequence_length": sequence_length,
        "chat": chat,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    if not changes or not recipe.needs_calibration:
        return recipe
    values = recipe.to_dict()
    values["calibration"] |= changes
    return any_recipe_from_dict(values, where=name)


def _with_inputs(recipe: AnyRecipe, inputs: Sequence[str], *, keep_texts: bool) -> AnyRecipe:
    """The recipe, calibrated on arrays that are given as NAME=FILE.npy."""
    from pipeline.recipe.recipe_file import any_recipe_from_dict

    for given in inputs:
        if not all(given.partition("=")):
            raise PipelineError(
                f"--inputs {given}: give the name of an input and a file, as --inputs NAME=FILE.npy"
            )
    if not recipe.needs_calibration:
        return recipe
    values = recipe.to_dict()
    arrays = {name: file for name, _, file in (given.partition("=") for given in inputs)}
    values["calibration"] |= {"inputs": arrays} | ({} if keep_texts else {"texts": []})
    return any_recipe_from_dict(values, where=recipe.name)
