"""The `quantfleet` commands about runs and releases: status, logs, promote, rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import options
from jobs.logging import log_event, print_json, print_result
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from jobs.publish.releases import Current


app = typer.Typer()


@app.command()
def status(
    what: Annotated[
        str, typer.Argument(help="A catalog's file, or the URL of its root or of a run.")
    ],
    as_json: options.Json = False,
) -> None:
    """Show the state of runs and releases, from storage alone."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.fleet.status import run_row, status_table
    from jobs.fleet.status import status as find_status
    from pipeline.plan import PLAN_KEY
    from pipeline.run import lease
    from pipeline.storage.object_store import open_store

    if what.endswith((".yaml", ".yml")):
        catalog = read_catalog(what)
        rows = find_status(open_store(catalog.root_url), catalog)
    else:
        store = open_store(what)
        if store.exists(PLAN_KEY) or store.list(lease.PREFIX):
            rows = (run_row(store),)
        else:
            rows = find_status(store)
            if not rows:
                raise PipelineError(f"{what}: no run, release or request is there")
    print_result(rows, status_table(rows), as_json=as_json)


@app.command()
def logs(
    run: Annotated[str, typer.Argument(help="Folder or URL of a run.")],
    as_json: options.Json = False,
) -> None:
    """Print the events that a run's drivers logged, oldest first."""
    from pipeline.run.events import read_events
    from pipeline.storage.object_store import open_store

    events = read_events(open_store(run))
    if not events:
        raise PipelineError(
            f"{run}: no events are there; give a run, as quantfleet status lists them"
        )
    if as_json:
        print_json([event.to_dict() for event in events])
    else:
        typer.echo("\n".join(event.line() for event in events))


@app.command()
def promote(
    root: options.CatalogRoot,
    model: options.ModelName,
    recipe: options.RecipeName,
    run_id: Annotated[str, typer.Argument(help="A run that was published under this name.")],
    as_json: options.Json = False,
) -> None:
    """Make a run's newest release the current one; nothing is deleted."""
    from jobs.publish import releases
    from pipeline.storage.object_store import open_store

    _print_current(releases.promote(open_store(root), model, recipe, run_id), as_json=as_json)


@app.command()
def rollback(
    root: options.CatalogRoot,
    model: options.ModelName,
    recipe: options.RecipeName,
    as_json: options.Json = False,
) -> None:
    """Make the previous release the current one; nothing is deleted."""
    from jobs.publish import releases
    from pipeline.storage.object_store import open_store

    _print_current(releases.rollback(open_store(root), model, recipe), as_json=as_json)


def _print_current(current: Current, *, as_json: bool) -> None:
    release = current.release
    if as_json:
        print_json(current)
    else:
        log_event(
            "current",
            f"{release.model} in {release.recipe_name}: release {release.number} is current, run "
            f"{release.run_id}",
        )
