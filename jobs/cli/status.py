"""The commands of `quantfleet` about what is there: how it stands, and what readers get."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.logging import log_event, print_json
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from jobs.publish.releases import Current

_Root = Annotated[str, typer.Argument(help="The catalog's root, where its results lie.")]
_Model = Annotated[str, typer.Argument(help="The model's name in the catalog.")]
_RecipeName = Annotated[str, typer.Argument(help="The recipe's name.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def add_commands(app: typer.Typer) -> None:
    """Register all of them."""
    app.command()(status)
    app.command()(logs)
    app.command()(promote)
    app.command()(rollback)


def status(
    what: Annotated[str, typer.Argument(help="A catalog's file, its root's URL, or a run's.")],
    as_json: _Json = False,
) -> None:
    """Tell how runs and releases stand, from storage alone."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.fleet.run_state import run_state
    from jobs.fleet.status import Row, status_table
    from jobs.fleet.status import status as find_status
    from pipeline.plan import PLAN_KEY
    from pipeline.storage.object_store import open_store

    if what.endswith((".yaml", ".yml")):
        catalog = read_catalog(what)
        rows = find_status(open_store(catalog.root_url), catalog)
    else:
        store = open_store(what)
        if store.exists(PLAN_KEY) or store.list("leases/"):
            found = run_state(store)
            name = store.root_url.rpartition("/")[2]
            rows = (
                Row(
                    model=name,
                    recipe="",
                    state=found.state,
                    run_id=name,
                    run=found,
                    source_bytes=found.source_bytes,
                    stored_bytes=found.stored_bytes,
                    text=found.text,
                ),
            )
        else:
            rows = find_status(store)
            if not rows:
                raise PipelineError(
                    f"{what}: neither a run nor anything published or asked for lies there"
                )
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        Console().print(status_table(rows))


def logs(
    run: Annotated[str, typer.Argument(help="A run's folder or URL, below runs/.")],
    as_json: _Json = False,
) -> None:
    """Print what a run's drivers noted, in the order of time."""
    from pipeline.run.events import read_events
    from pipeline.storage.object_store import open_store

    events = read_events(open_store(run))
    if not events:
        raise PipelineError(f"{run}: no events lie there; name a run, as quantfleet status does")
    if as_json:
        print_json([event.to_dict() for event in events])
        return
    for event in events:
        typer.echo(event.line())


def promote(
    root: _Root,
    model: _Model,
    recipe: _RecipeName,
    run_id: Annotated[str, typer.Argument(help="A run that was published under this name.")],
    as_json: _Json = False,
) -> None:
    """Make a run's release the current one; nothing is deleted."""
    from jobs.publish import promote as by_hand
    from pipeline.storage.object_store import open_store

    _print_current(by_hand.promote(open_store(root), model, recipe, run_id), as_json=as_json)


def rollback(root: _Root, model: _Model, recipe: _RecipeName, as_json: _Json = False) -> None:
    """Make the release before the current one current; nothing is deleted."""
    from jobs.publish import promote as by_hand
    from pipeline.storage.object_store import open_store

    _print_current(by_hand.rollback(open_store(root), model, recipe), as_json=as_json)


def _print_current(current: Current, *, as_json: bool) -> None:
    release = current.release
    if as_json:
        print_json(dataclasses.asdict(current))
    else:
        log_event(
            "current",
            f"current of {release.model} in {release.recipe_name}: release {release.number}, run "
            f"{release.run_id}",
        )
