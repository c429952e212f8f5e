"""The commands of `quantfleet` about many models. Nothing heavy is imported before one runs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from jobs.catalog.catalog_file import Catalog
    from jobs.fleet.staleness import Decision
    from jobs.publishing.releases import Current
    from pipeline.storage.object_store import ObjectStore

catalog_app = typer.Typer(help="Catalogs: the models and recipes that a team wants.")

_File = Annotated[str, typer.Argument(help="The catalog: a YAML file, or its URL.")]
_Root = Annotated[str, typer.Argument(help="The catalog's root, where its results lie.")]
_Model = Annotated[str, typer.Argument(help="The model's name in the catalog.")]
_RecipeName = Annotated[str, typer.Argument(help="The recipe's name.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, such as auto or HOST:PORT; default: start one."),
]
_Dashboard = Annotated[
    str, typer.Option(help="The Ray cluster's dashboard, such as http://head:8265.")
]
_LeaseSeconds = Annotated[
    float,
    typer.Option(min=1.0, help="Silence after which another driver of a run is taken for dead."),
]
_Only = Annotated[
    list[str] | None, typer.Option(help="Only these models of the catalog; repeatable.")
]


def add_commands(app: typer.Typer) -> None:
    """Register all of them."""
    app.add_typer(catalog_app, name="catalog")
    app.command()(run)
    app.command()(nightly)
    app.command()(submit)
    app.command()(cancel)
    app.command()(fulfil)
    app.command()(status)
    app.command()(logs)
    app.command()(promote)
    app.command()(rollback)


@catalog_app.command()
def check(file: _File, as_json: _Json = False) -> None:
    """Check a whole catalog, and list what it wants; no model is looked at."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.catalog.listing import catalog_json, catalog_table

    catalog = read_catalog(file)
    if as_json:
        _print_json(catalog_json(catalog))
    else:
        Console().print(catalog_table(catalog))


@catalog_app.callback()
def _catalog() -> None:
    """Catalogs: the models and recipes that a team wants."""


def run(
    file: _File,
    address: _Address = None,
    only: _Only = None,
    lease_seconds: _LeaseSeconds = 60.0,
    as_json: _Json = False,
) -> None:
    """Make all of a catalog that is not up to date, one run after the other."""
    _pass(file, address, only, lease_seconds, dry_run=False, as_json=as_json)


def nightly(
    file: _File,
    address: _Address = None,
    only: _Only = None,
    lease_seconds: _LeaseSeconds = 60.0,
    dry_run: Annotated[
        bool, typer.Option(help="Print what is stale and why; run and write nothing.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Find out what is stale and why, make that once, and publish what is good enough."""
    _pass(file, address, only, lease_seconds, dry_run=dry_run, as_json=as_json)


def submit(
    file: _File,
    address: _Dashboard,
    wait: Annotated[bool, typer.Option(help="Stay until every run is done or given up.")] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Jobs alive at the same time.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, help="Jobs started for one run, at most.")] = 3,
    only: _Only = None,
    working_dir: Annotated[
        str | None,
        typer.Option(help="Folder, or URI of a .zip, to ship; default: nodes have the code."),
    ] = None,
    entrypoint: Annotated[
        str, typer.Option(help="How nodes call quantfleet, found on their PATH.")
    ] = "quantfleet",
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="Between looks at the jobs.")] = 5.0,
    as_json: _Json = False,
) -> None:
    """Carry a catalog's stale runs out as Ray Jobs, and resume those that failed."""
    from jobs.fleet.one_pass import exit_code_of, pass_table, preview
    from jobs.fleet.ray_jobs import RayJobs
    from jobs.fleet.staleness import decide
    from jobs.fleet.submission import Limits, Submission, exit_code_of_tasks
    from jobs.fleet.submission_table import tasks_json, tasks_table, watch_tasks

    console = _stderr()
    catalog, root = _opened(file, only)
    jobs = RayJobs(address, working_dir=working_dir)
    with console.status("looking for what is stale"):
        decisions = decide(root, catalog, note=True)
    others = [outcome for outcome in preview(decisions) if outcome.result != "to do"]
    limits = Limits(at_once=at_once, attempts=attempts, poll_seconds=poll_seconds)
    submission = Submission(root, jobs, decisions, limits, entrypoint)
    if wait:
        with watch_tasks(console) as tell:
            submission.finish(tell)
    else:
        submission.step()
    if as_json:
        _print_json(
            {"jobs": tasks_json(submission.tasks), "others": [one.to_dict() for one in others]}
        )
    else:
        console.print(tasks_table(submission.tasks))
        console.print(pass_table(others))
        waiting = sum(1 for task in submission.tasks if task.phase == "waiting")
        if waiting:
            console.print(f"{waiting} run(s) wait for a place; submit again, or use --wait")
    raise typer.Exit(exit_code_of_tasks(submission.tasks) or exit_code_of(others))


def cancel(
    name: Annotated[str, typer.Argument(help="A request's or a submission's id.")],
    address: _Dashboard,
    as_json: _Json = False,
) -> None:
    """Stop the Ray Jobs of a request; the run can be resumed."""
    from jobs.fleet.ray_jobs import RayJobs
    from jobs.fleet.submission import stop_jobs

    stopped = stop_jobs(RayJobs(address), name)
    if not stopped:
        raise PipelineError(f"{name}: no such job is alive at {address}; nothing was stopped")
    if as_json:
        _print_json(list(stopped))
    for submission_id in stopped:
        _stderr().print(f"stopping {submission_id}", soft_wrap=True)


def fulfil(
    request: Annotated[str, typer.Argument(help="URL of a request below a catalog's root.")],
    address: _Address = None,
    wait: Annotated[
        bool, typer.Option(help="Wait for another driver of the same run to end, or give up.")
    ] = True,
    lease_seconds: _LeaseSeconds = 60.0,
    as_json: _Json = False,
) -> None:
    """Carry one request out: quantize, evaluate, verify, judge, publish."""
    from jobs.catalog.request import load_request
    from jobs.fleet import fulfil as fulfilling
    from jobs.fleet import workplace

    root, wanted = load_request(request)
    console = _stderr()
    done = fulfilling.fulfil(
        root, wanted, workplace.on_ray(address), console, wait=wait, lease_seconds=lease_seconds
    )
    if as_json:
        _print_json(fulfilling.fulfilled_json(done))
    for release in done.releases:
        console.print(
            f"published as {release.model} in {release.recipe_name}, release {release.number}",
            soft_wrap=True,
        )
    if not done.verdict.passed:
        raise fulfilling.GateFailedError(
            f"{wanted.request_id} is not good enough: {'; '.join(done.verdict.failures)}; it is "
            "kept, and what was published before stays"
        )


def status(
    what: Annotated[str, typer.Argument(help="A catalog's file, its root's URL, or a run's.")],
    as_json: _Json = False,
) -> None:
    """Tell how runs and releases stand, from storage alone."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.fleet.run_state import run_state
    from jobs.fleet.status import Row
    from jobs.fleet.status import status as find_status
    from jobs.fleet.status_table import status_table
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
        _print_json([row.to_dict() for row in rows])
    else:
        Console().print(status_table(rows))


def logs(
    run: Annotated[str, typer.Argument(help="A run's folder or URL, below runs/.")],
    as_json: _Json = False,
) -> None:
    """Print what a run's drivers noted, in the order of time."""
    from jobs.fleet.event_lines import event_dict, event_lines, read_events
    from pipeline.storage.object_store import open_store

    events = read_events(open_store(run))
    if not events:
        raise PipelineError(f"{run}: no events lie there; name a run, as quantfleet status does")
    if as_json:
        _print_json([event_dict(event) for event in events])
    for line in () if as_json else event_lines(events):
        typer.echo(line)


def promote(
    root: _Root,
    model: _Model,
    recipe: _RecipeName,
    run_id: Annotated[str, typer.Argument(help="A run that was published under this name.")],
    as_json: _Json = False,
) -> None:
    """Make a run's release the current one; nothing is deleted."""
    from jobs.publishing import by_hand
    from pipeline.storage.object_store import open_store

    _print_current(by_hand.promote(open_store(root), model, recipe, run_id), as_json=as_json)


def rollback(root: _Root, model: _Model, recipe: _RecipeName, as_json: _Json = False) -> None:
    """Make the release before the current one current; nothing is deleted."""
    from jobs.publishing import by_hand
    from pipeline.storage.object_store import open_store

    _print_current(by_hand.rollback(open_store(root), model, recipe), as_json=as_json)


def _pass(
    file: str,
    address: str | None,
    only: list[str] | None,
    lease_seconds: float,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from jobs.fleet import workplace
    from jobs.fleet.fulfil import Fulfilled
    from jobs.fleet.fulfil import fulfil as fulfil_request
    from jobs.fleet.one_pass import exit_code_of, one_pass, pass_table, preview
    from jobs.fleet.staleness import decide

    console = _stderr()
    catalog, root = _opened(file, only)
    with console.status("looking for what is stale"):
        decisions = decide(root, catalog, note=not dry_run)

    def carry(decision: Decision) -> Fulfilled:
        return fulfil_request(
            root,
            decision.request,
            workplace.on_ray(address),
            console,
            wait=False,
            lease_seconds=lease_seconds,
        )

    if dry_run:
        outcomes = preview(decisions)
    else:
        outcomes = tuple(one_pass(root, decisions, carry, console))
    if as_json:
        _print_json([outcome.to_dict() for outcome in outcomes])
    else:
        console.print(pass_table(outcomes))
    raise typer.Exit(exit_code_of(outcomes))


def _opened(file: str, only: list[str] | None) -> tuple[Catalog, ObjectStore]:
    """A checked catalog, and its root, which answers."""
    import dataclasses

    from jobs.catalog.catalog_file import read_catalog
    from pipeline.storage.object_store import Patience, open_store

    catalog = read_catalog(file)
    if only:
        unknown = sorted(set(only) - {entry.name for entry in catalog.entries})
        if unknown:
            raise PipelineError(f"{file}: no model {', '.join(unknown)}; mend --only")
        chosen = tuple(entry for entry in catalog.entries if entry.name in only)
        catalog = dataclasses.replace(catalog, entries=chosen)
    # At once: a store may rest for a while during a run, but not when it is named.
    patience = Patience.configured()
    soon = min(15.0, patience.deadline_seconds)
    open_store(catalog.root_url, dataclasses.replace(patience, deadline_seconds=soon)).exists("x")
    return catalog, open_store(catalog.root_url)


def _print_current(current: Current, *, as_json: bool) -> None:
    import dataclasses

    release = current.release
    if as_json:
        _print_json(dataclasses.asdict(current))
    else:
        _stderr().print(
            f"current of {release.model} in {release.recipe_name}: release {release.number}, run "
            f"{release.run_id}",
            soft_wrap=True,
        )


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _stderr() -> Console:
    """Paths and names are text, not markup, however they are spelled."""
    return Console(stderr=True, markup=False, highlight=False)
