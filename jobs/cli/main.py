"""The `quantfleet` command.

Starting it must stay instant, so nothing here may import Ray, JAX or Keras before a command needs
them. Exit codes: 0 done; 1 a fault of ours; 2 bad input; 3 storage or cluster cannot be used as
asked; 4 a result that is damaged or incomplete; 5 a result that did not pass its gate;
130 interrupted; 143 terminated.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Never

import typer
from rich.console import Console

from jobs.cli import fleet, status
from jobs.cli.listings import describe_scheme, schemes_table
from jobs.logging import FORMAT_VARIABLE, LogFormat, configure, is_json, log_event, set_run
from jobs.termination import Terminated
from pipeline.errors import PipelineError
from pipeline.storage.backend import PATIENCE_VARIABLE
from quantizer.errors import QuantizationError
from quantizer.schemes import SCHEMES

if TYPE_CHECKING:
    from jobs.quantize import Place
    from pipeline.recipe.recipe import Recipe

app = typer.Typer(
    help="Quantize Keras language models in batches.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, such as auto or 10.0.0.5:6379; default: start one."),
]
_Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers; default: one a node, or one a GPU.")
]
_Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of each worker; they decide rounding, so they are planned."),
]
_Device = Annotated[str, typer.Option(help="auto, cpu or gpu.")]
_EvaluationTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--evaluate-on", help="Texts, other than calibration's, to judge the result by; repeatable."
    ),
]
_Windows = Annotated[int, typer.Option("--windows", min=1, help="Token windows to evaluate on.")]
_KeepEvery = Annotated[
    int, typer.Option(min=1, help="Blocks between activations kept in storage, to resume from.")
]
_Wait = Annotated[
    bool,
    typer.Option(help="Wait for another driver of the same run to end, or give up."),
]
_LeaseSeconds = Annotated[
    float,
    typer.Option(min=1.0, help="Silence after which another driver of a run is taken for dead."),
]
_Patience = Annotated[
    float | None,
    typer.Option(
        "--storage-patience",
        min=0.0,
        help="Seconds that storage may be away before the run ends; default: 300.",
    ),
]


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
            help="What stderr gets: text, or JSON objects, one a line; before the command.",
        ),
    ] = "text",
) -> None:
    """Options that belong to no command."""
    os.environ[FORMAT_VARIABLE] = log_format  # also for the processes that a command starts
    # Else Ray's nodes speak on stdout, among results, of what is told here anyway.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    set_run()
    configure(log_format)


@app.command()
def schemes(as_json: _Json = False) -> None:
    """List the quantization schemes: their fields, defaults and meaning."""
    described = {mode: describe_scheme(scheme) for mode, scheme in SCHEMES.items()}
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        Console().print(schemes_table(described))


@app.command()
def recipes(as_json: _Json = False) -> None:
    """List the built-in recipes."""
    from jobs.cli.listings import recipes_json, recipes_table

    if as_json:
        typer.echo(json.dumps(recipes_json(), indent=2))
    else:
        Console().print(recipes_table())


@app.command()
def quantize(
    preset: Annotated[str, typer.Argument(help="Folder of a KerasHub preset, or its URL.")],
    recipe: Annotated[str, typer.Option(help="A built-in recipe's name, or a YAML file.")],
    output: Annotated[str, typer.Option(help="Where to write: a folder, or a URL.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on these texts instead of the recipe's; repeatable."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration windows, instead of the recipe's.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each, instead of the recipe's.")
    ] = None,
    evaluate_on: _EvaluationTexts = None,
    windows: _Windows = 8,
    address: _Address = None,
    workers: _Workers = None,
    threads: _Threads = None,
    device: _Device = "auto",
    keep_every: _KeepEvery = 8,
    wait: _Wait = True,
    lease_seconds: _LeaseSeconds = 60.0,
    patience: _Patience = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the plan and its cost; run nothing.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Quantize one model by one recipe, or go on where an earlier attempt stopped."""
    from jobs.quantize import Driving, Job, run_job

    _be_patient(patience)
    job = Job(
        source_url=preset,
        recipe=_recipe(recipe, texts, num_samples, sequence_length),
        output_url=output,
        evaluation_texts=tuple(evaluate_on or ()),
        evaluation_windows=windows,
        driving=Driving(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )
    run_job(
        job,
        _place(address, workers, threads, device),
        as_json=as_json,
        dry_run=dry_run,
    )


@app.command()
def resume(
    output: Annotated[str, typer.Argument(help="Where the run was writing.")],
    source: Annotated[
        str | None, typer.Option(help="The preset, should it lie elsewhere now.")
    ] = None,
    address: _Address = None,
    workers: _Workers = None,
    threads: _Threads = None,
    device: _Device = "auto",
    keep_every: _KeepEvery = 8,
    wait: _Wait = True,
    lease_seconds: _LeaseSeconds = 60.0,
    patience: _Patience = None,
    as_json: _Json = False,
) -> None:
    """Go on with a run from its last committed block."""
    from jobs.quantize import Driving, resume_job

    _be_patient(patience)
    resume_job(
        output,
        _place(address, workers, threads, device),
        as_json=as_json,
        source_url=source,
        driving=Driving(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds),
    )


@app.command()
def evaluate(
    output: Annotated[str, typer.Argument(help="Where a finished run wrote.")],
    evaluate_on: _EvaluationTexts = None,
    windows: _Windows = 8,
    source: Annotated[
        str | None, typer.Option(help="The preset, should it lie elsewhere now.")
    ] = None,
    address: _Address = None,
    workers: _Workers = None,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Compare a finished result with its source, on texts."""
    from jobs.quantize import Driving, resume_job

    if not evaluate_on:
        raise PipelineError("nothing to evaluate on; give --evaluate-on texts.jsonl")
    resume_job(
        output,
        _place(address, workers, None, device),
        as_json=as_json,
        source_url=source,
        driving=Driving(),
        evaluation_texts=tuple(evaluate_on),
        evaluation_windows=windows,
        must_be_finished=True,
    )


@app.command()
def verify(
    output: Annotated[str, typer.Argument(help="Where a finished run wrote.")],
    stock: Annotated[
        bool, typer.Option(help="Also load and run it with stock KerasHub, in a fresh process.")
    ] = True,
    as_json: _Json = False,
) -> None:
    """Check every file of a finished result, and that stock KerasHub loads it."""
    from jobs.verify import verify_run

    verify_run(output, stock=stock, as_json=as_json)


@app.command()
def gc(
    url: Annotated[str, typer.Argument(help="A run, or a place below which runs lie.")],
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete it; otherwise it is only listed.")
    ] = False,
    unpublished: Annotated[
        bool,
        typer.Option(
            "--unpublished", help="Of a catalog's root: also runs that were never published."
        ),
    ] = False,
    lease_seconds: _LeaseSeconds = 60.0,
    as_json: _Json = False,
) -> None:
    """List, or delete, what no manifest, plan, release or living run refers to."""
    from jobs.gc import collect

    collect(
        url,
        delete=delete,
        lease_seconds=lease_seconds,
        as_json=as_json,
        unpublished=unpublished,
    )


fleet.add_commands(app)
status.add_commands(app)


def _be_patient(seconds: float | None) -> None:
    """With storage, here and in all processes of the run."""
    if seconds is not None:
        os.environ[PATIENCE_VARIABLE] = str(seconds)


def _recipe(
    name: str, texts: Sequence[str] | None, num_samples: int | None, sequence_length: int | None
) -> Recipe:
    from pipeline.recipe.recipe_file import load_recipe, recipe_from_dict

    recipe = load_recipe(name)
    given = {"texts": texts or None, "num_samples": num_samples, "sequence_length": sequence_length}
    changes = {field: value for field, value in given.items() if value is not None}
    if not changes or not recipe.needs_calibration:
        return recipe
    values = recipe.to_dict()
    values["calibration"] |= changes
    return recipe_from_dict(values, where=name)


def _place(address: str | None, workers: int | None, threads: int | None, device: str) -> Place:
    from jobs.quantize import Place

    if device not in ("auto", "cpu", "gpu"):
        raise PipelineError(f"--device must be auto, cpu or gpu, not {device!r}")
    return Place(address=address, workers=workers, threads=threads, device=device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: a user's mistake costs one line and an exit code, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configure("json" if is_json() else "text")  # also for mistakes in the command line itself
    try:
        status = app(arguments or ["--help"], prog_name="quantfleet", standalone_mode=False)
    except typer.TyperException as mistake:
        _end(mistake.format_message(), 2)
    except PipelineError as error:
        _end(str(error), error.exit_code)
    except QuantizationError as error:
        _end(str(error), 2)
    except Terminated:
        _end("", 143)
    except (typer.Abort, KeyboardInterrupt):  # Ctrl-C
        _end("", 130)
    sys.exit(status or 0)


def _end(message: str, exit_code: int) -> Never:
    message = " ".join(message.split())
    if message and not is_json():
        message = f"quantfleet: {message}"
    event = "failed" if message else "interrupted"
    log_event(event, message, {"exit_code": exit_code}, level=logging.ERROR)
    sys.exit(exit_code)
