"""The commands of `quantfleet` about many models. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.logging import STDERR, is_json, log_event, print_json, status
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from jobs.catalog.catalog_file import Catalog
    from jobs.fleet.staleness import Decision
    from pipeline.storage.object_store import ObjectStore

catalog_app = typer.Typer(help="Catalogs: the models and recipes that a team wants.")

_File = Annotated[str, typer.Argument(help="The catalog: a YAML file, or its URL.")]
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


@catalog_app.command()
def check(file: _File, as_json: _Json = False) -> None:
    """Check a whole catalog, and list what it wants; no model is looked at."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.catalog.listing import catalog_json, catalog_table

    catalog = read_catalog(file)
    if as_json:
        print_json(catalog_json(catalog))
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
    from jobs.fleet.nightly import exit_code_of, pass_table, preview
    from jobs.fleet.staleness import decide
    from jobs.fleet.submission import (
        Limits,
        Submission,
        exit_code_of_tasks,
        tasks_json,
        tasks_table,
        watch_tasks,
    )
    from pipeline.executor.ray_jobs import RayJobs

    catalog, root = _opened(file, only)
    jobs = RayJobs(address, working_dir=working_dir)
    with status("looking for what is stale"):
        decisions = decide(root, catalog, note=True)
    others = [outcome for outcome in preview(decisions) if outcome.result != "to do"]
    limits = Limits(at_once=at_once, attempts=attempts, poll_seconds=poll_seconds)
    submission = Submission(root, jobs, decisions, limits, entrypoint)
    if wait:
        with watch_tasks() as show:
            submission.finish(show)
    else:
        submission.step()
    if as_json:
        print_json(
            {"jobs": tasks_json(submission.tasks), "others": [one.to_dict() for one in others]}
        )
    else:
        jobs_json = tasks_json(submission.tasks)
        log_event("jobs", "", {"jobs": jobs_json}, table=tasks_table(submission.tasks))
        others_json = [one.to_dict() for one in others]
        log_event("others", "", {"others": others_json}, table=pass_table(others))
        waiting = sum(1 for task in submission.tasks if task.phase == "waiting")
        if waiting:
            more = f"{waiting} run(s) wait for a place; submit again, or use --wait"
            log_event("waiting", more)
    raise typer.Exit(exit_code_of_tasks(submission.tasks) or exit_code_of(others))


def cancel(
    name: Annotated[str, typer.Argument(help="A request's or a submission's id.")],
    address: _Dashboard,
    as_json: _Json = False,
) -> None:
    """Stop the Ray Jobs of a request; the run can be resumed."""
    from jobs.fleet.submission import stop_jobs
    from pipeline.executor.ray_jobs import RayJobs

    stopped = stop_jobs(RayJobs(address), name)
    if not stopped:
        raise PipelineError(f"{name}: no such job is alive at {address}; nothing was stopped")
    if as_json:
        print_json(list(stopped))
    for submission_id in stopped:
        log_event("stopping", f"stopping {submission_id}", {"job": submission_id})


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
    done = fulfilling.fulfil(
        root, wanted, workplace.on_ray(address), wait=wait, lease_seconds=lease_seconds
    )
    if as_json:
        print_json(fulfilling.fulfilled_json(done))
    for release in done.releases:
        log_event(
            "published",
            f"published as {release.model} in {release.recipe_name}, release {release.number}",
            {"release": release.number},
        )
    if not done.verdict.passed:
        raise fulfilling.GateFailedError(
            f"{wanted.request_id} is not good enough: {'; '.join(done.verdict.failures)}; it is "
            "kept, and what was published before stays"
        )


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
    from jobs.fleet.nightly import exit_code_of, log_outcome, one_pass, pass_table, preview
    from jobs.fleet.staleness import decide
    from jobs.metrics import nightly_ended
    from pipeline.executor.ray_executor import joined

    catalog, root = _opened(file, only)
    with status("looking for what is stale"):
        decisions = decide(root, catalog, note=not dry_run)

    def carry(decision: Decision) -> Fulfilled:
        return fulfil_request(
            root,
            decision.request,
            workplace.on_ray(address),
            wait=False,
            lease_seconds=lease_seconds,
        )

    if dry_run:
        outcomes = preview(decisions)
        for outcome in outcomes:
            log_outcome(outcome)
    else:
        outcomes = tuple(one_pass(root, decisions, carry))
        if address is not None and not exit_code_of(outcomes):
            with joined(address):  # an embedded cluster ends with its run, and its metrics too
                nightly_ended(PurePath(file).stem)
    if as_json:
        print_json([outcome.to_dict() for outcome in outcomes])
    elif not is_json():  # which told each when it was known
        STDERR.print(pass_table(outcomes))
    raise typer.Exit(exit_code_of(outcomes))


def _opened(file: str, only: list[str] | None) -> tuple[Catalog, ObjectStore]:
    """A checked catalog, and its root, which answers."""
    import dataclasses

    from jobs.catalog.catalog_file import read_catalog
    from jobs.catalog.request import REQUESTS_PREFIX
    from jobs.reachable import reachable

    catalog = read_catalog(file)
    if only:
        unknown = sorted(set(only) - {entry.name for entry in catalog.entries})
        if unknown:
            raise PipelineError(f"{file}: no model {', '.join(unknown)}; mend --only")
        chosen = tuple(entry for entry in catalog.entries if entry.name in only)
        catalog = dataclasses.replace(catalog, entries=chosen)
    return catalog, reachable(catalog.root_url, REQUESTS_PREFIX.rstrip("/"))
