"""The `quantfleet` command.

It must start instantly, so nothing here imports Ray, JAX or Keras before a command needs them.
"""

from __future__ import annotations

import errno
import importlib.metadata
import io
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Never

import typer

from jobs.cli import fleet, options
from jobs.logging import (
    FORMAT_VARIABLE,
    LogFormat,
    configure,
    is_json,
    log_event,
    print_result,
    set_run,
)
from jobs.termination import Terminated, terminable
from pipeline.errors import PipelineError
from pipeline.executor.protocol import ComputeSpec
from pipeline.export.code_formats import ExportFormat
from quantizer.errors import QuantizationError

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

app = typer.Typer(
    help="Quantize Keras language models in batches.",
    epilog=(
        "Exit codes: 0 done, 1 internal error, 2 bad input, 3 storage or cluster unavailable or "
        "run held by another driver, 4 damaged or incomplete result, 5 gate not passed, "
        "130 interrupted, 143 terminated."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"quantfleet {importlib.metadata.version('quantfleet')}")
        raise typer.Exit


@app.callback()
def quantfleet(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            envvar=FORMAT_VARIABLE,
            help="What is written to stderr: text, or one JSON object per line.",
        ),
    ] = "text",
) -> None:
    """Options that belong to no command."""
    os.environ[FORMAT_VARIABLE] = log_format  # also for the processes that a command starts
    # Otherwise Ray's nodes print to stdout, among the results, what is reported here anyway.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    set_run()
    configure(log_format)


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
    chat: options.Chat = None,
    windows: options.Windows = 8,
    address: options.Address = None,
    workers: options.Workers = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    keep_every: options.KeepEvery = 8,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    _patience: options.StoragePatience = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")
    ] = False,
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
                "--address": address,
                "--workers": workers,
            },
        )
    from jobs.execute import DriverOptions
    from jobs.quantize import Job, run_job

    job = Job(
        source_url=preset,
        output_url=output,
        evaluation_texts=tuple(evaluate_on or ()),
        evaluation_windows=windows,
        chat=chat,
        options=DriverOptions(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )
    spec = ComputeSpec(workers=workers, threads=threads, device=device)
    changed = _recipe(recipe, texts, num_samples, sequence_length, chat)
    if dtype is not None:
        changed = changed.model_copy(update={"dtype": dtype})
    if allow_partial:
        changed = changed.model_copy(update={"allow_partial": True})
    if inputs:
        changed = _with_inputs(changed, inputs, keep_texts=not is_file)
    if is_file:
        from jobs.quantize_file import run_file

        run_file(preset, output, changed, spec, as_json=as_json, dry_run=dry_run)
        return
    run_job(job, changed, spec, address, as_json=as_json, dry_run=dry_run)


@app.command()
def resume(
    output: Annotated[str, typer.Argument(help="Folder or URL of the run.")],
    source: options.Source = None,
    address: options.Address = None,
    workers: options.Workers = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    keep_every: options.KeepEvery = 8,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    _patience: options.StoragePatience = None,
    as_json: options.Json = False,
) -> None:
    """Continue a run from its last committed block."""
    from jobs.execute import DriverOptions
    from jobs.quantize import Job, resume_job

    job = Job(
        source_url=source or "",
        output_url=output,
        options=DriverOptions(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )
    spec = ComputeSpec(workers=workers, threads=threads, device=device)
    resume_job(job, spec, address, as_json=as_json)


@app.command()
def evaluate(
    output: options.FinishedRun,
    evaluate_on: options.EvaluateOn = None,
    chat: options.Chat = None,
    windows: options.Windows = 8,
    source: options.Source = None,
    address: options.Address = None,
    workers: options.Workers = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Compare a finished result with its source, on texts."""
    from jobs.quantize import Job, resume_job

    if not evaluate_on:
        raise PipelineError("nothing to evaluate on; give --evaluate-on texts.jsonl")
    job = Job(
        source_url=source or "",
        output_url=output,
        evaluation_texts=tuple(evaluate_on),
        evaluation_windows=windows,
        chat=chat,
    )
    spec = ComputeSpec(workers=workers, device=device)
    resume_job(job, spec, address, as_json=as_json, must_be_finished=True)


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
    like: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder of the model: take config and tokenizer from it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written; write nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a finished result as a checkpoint for transformers, vLLM and others."""
    from jobs.export import ExportJob, export_run

    job = ExportJob(run_url=output, format=export_format, to_url=to, dtype=dtype, like_url=like)
    export_run(job, dry_run=dry_run, as_json=as_json)


app.add_typer(fleet.app)


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
    lease_seconds: options.LeaseSeconds = 60.0,
    as_json: options.Json = False,
) -> None:
    """List, or delete, what no manifest, plan, release or running driver refers to."""
    from jobs.gc import collect

    collect(
        url, delete=delete, lease_seconds=lease_seconds, as_json=as_json, unpublished=unpublished
    )


@app.command()
def schemes(as_json: options.Json = False) -> None:
    """List the quantization schemes: their fields, defaults and meaning."""
    from jobs.cli.listings import describe_scheme, schemes_table
    from quantizer.schemes import SCHEMES

    described = {mode: describe_scheme(scheme) for mode, scheme in SCHEMES.items()}
    print_result(described, schemes_table(described), as_json=as_json)


@app.command()
def recipes(as_json: options.Json = False) -> None:
    """List the built-in recipes."""
    from jobs.cli.listings import recipes_table
    from pipeline.recipe.recipe_file import builtin_recipes

    found = builtin_recipes()
    values = {name: recipe.to_dict() for name, recipe in found.items()}
    print_result(values, recipes_table(found), as_json=as_json)


def _recipe(
    name: str,
    texts: Sequence[str] | None,
    num_samples: int | None,
    sequence_length: int | None,
    chat: bool | None,
) -> Recipe:
    from pipeline.recipe.recipe_file import load_recipe, recipe_from_dict

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
    return recipe_from_dict(values, where=name)


def _with_inputs(recipe: Recipe, inputs: Sequence[str], *, keep_texts: bool) -> Recipe:
    """The recipe, calibrated on arrays that are given as NAME=FILE.npy."""
    from pipeline.recipe.recipe_file import recipe_from_dict

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
    return recipe_from_dict(values, where=recipe.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake costs one line and an exit code, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configure("json" if is_json() else "text")  # for mistakes in the command line itself
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character gets a question mark.
        sys.stdout.reconfigure(errors="replace")
    try:
        with terminable():
            exit_code = app(arguments or ["--help"], prog_name="quantfleet", standalone_mode=False)
    except typer.TyperException as mistake:
        _end(_usage_message(mistake), 2)
    except PipelineError as error:
        _end(str(error), error.exit_code)
    except QuantizationError as error:
        _end(str(error), 2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = error.filename or f"{tempfile.gettempdir()}, or the folder of the output"
        _end(f"{place}: {error.strerror}; free some space, or set TMPDIR to another folder", 3)
    except Terminated:
        _end("", 143)
    except (typer.Abort, KeyboardInterrupt):  # Ctrl-C
        _end("", 130)
    sys.exit(exit_code or 0)


def _usage_message(mistake: typer.TyperException) -> str:
    # Typer's own choices are checked by pydantic, whose messages begin like this.
    message = mistake.format_message().replace("Value error, ", "")
    message += "" if message.endswith((".", "?")) else "."
    context = getattr(mistake, "ctx", None)
    return message if context is None else f"{message} See {context.command_path} --help."


def _end(message: str, exit_code: int) -> Never:
    event = "failed" if message else "interrupted"
    message = " ".join(message.split())
    if message and not is_json():
        message = f"quantfleet: {message}"
    log_event(event, message, {"exit_code": exit_code}, level=logging.ERROR)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
