"""The `quantfleet` commands about catalogs, and the requests, runs and releases of their models."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli import options
from jobs.logging import (
    log_event,
    print_json,
    print_json_list,
    print_result,
    status,
    visible,
    waiting,
)
from pipeline.errors import PipelineError
from pipeline.storage.object_store import ObjectStore

if TYPE_CHECKING:
    from jobs.catalog.catalog_file import Catalog
    from jobs.publish.releases import Current

app = typer.Typer()
catalog_app = typer.Typer(help="Catalogs: lists of models and recipes to keep up to date.")
app.add_typer(catalog_app, name="catalog")


@catalog_app.callback()
def _catalog() -> None:
    """Keeps `check` a command of its own, though it is the only one."""


@catalog_app.command()
def check(file: options.CatalogFile, as_json: options.Json = False) -> None:
    """Check a catalog and list its models, without opening them."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.cli.listings import catalog_json, catalog_table

    catalog = read_catalog(file)
    print_result(catalog_json(catalog), catalog_table(catalog), as_json=as_json)


@app.command()
def run(
    file: options.CatalogFile,
    address: options.Address = None,
    only: options.Only = None,
    keep_every: options.KeepEvery = 8,
    lease_seconds: options.LeaseSeconds = 60.0,
    as_json: options.Json = False,
) -> None:
    """Make everything in a catalog that is not up to date, one run after another."""
    nightly(file, address, only, keep_every, lease_seconds, dry_run=False, as_json=as_json)


@app.command()
def nightly(
    file: options.CatalogFile,
    address: options.Address = None,
    only: options.Only = None,
    keep_every: options.KeepEvery = 8,
    lease_seconds: options.LeaseSeconds = 60.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what is stale and why; run and write nothing."),
    ] = False,
    on: options.On = None,
    rates: options.Rates = None,
    as_json: options.Json = False,
) -> None:
    """Make what is stale, say why it was, and publish what passes its gate."""
    from jobs import execute
    from jobs.cli.dry_runs import show_outcomes
    from jobs.fleet import fulfil as fulfilling
    from jobs.fleet.kept_workers import kept_workers
    from jobs.fleet.nightly import (
        Survey,
        exit_code_of,
        foresee,
        log_outcome,
        night_entries,
        num_by_result,
        refuse_impossible,
        run_stale,
    )
    from jobs.fleet.nights import Clock
    from jobs.fleet.past_nights import PastNights
    from jobs.fleet.remembering import remembering
    from jobs.fleet.staleness import decide
    from jobs.metrics import tell_of_pass
    from jobs.run_costs import PricedMachine, refuse_without_dry_run

    refuse_without_dry_run(on, rates, dry_run=dry_run)
    priced = PricedMachine.of(on, rates) if dry_run else None
    whole, catalog, root = _opened(file, only)
    began = Clock.started()
    with status("looking for stale runs"):
        survey = Survey.of(decide(root, catalog, save_verified=not dry_run))
    num_entries = len(survey.outcomes)
    if priced is not None:
        plan_only = partial(execute.open_compute, address=address, plan_only=True)
        with status("working out what each run would take"):
            outcomes = foresee(root, survey, plan_only, priced)
        if survey.stale and priced.named is None:
            PastNights.read(root).tell()
        for outcome in outcomes:
            log_outcome(outcome)
    else:
        driven = execute.DriverOptions(
            keep_every=keep_every, wait=False, lease_seconds=lease_seconds
        )
        refuse_impossible(root, survey)
        outcomes = []
        with (
            remembering(root, whole, file, began, num_entries, lambda: night_entries(outcomes)),
            kept_workers(partial(execute.open_compute, address=address)) as compute,
        ):
            fulfil_one = partial(fulfilling.fulfil, root, open_compute=compute, options=driven)
            outcomes.extend(run_stale(root, survey, fulfil_one))
    if as_json:
        print_json_list(outcome.to_dict() for outcome in outcomes)
    else:
        show_outcomes(outcomes)
    if address is not None and not dry_run:
        # Last, as the cluster may be what failed. One of our own ends with its run, and so do its
        # metrics.
        went_well = not exit_code_of(outcomes)
        tell_of_pass(address, PurePath(file).stem, num_by_result(outcomes), went_well=went_well)
    raise typer.Exit(exit_code_of(outcomes))


@app.command()
def submit(
    file: options.CatalogFile,
    address: options.Dashboard,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until every run is done or given up.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Jobs alive at the same time.")] = 4,
    attempts: Annotated[int, typer.Option(min=1, help="Most jobs started for one run.")] = 3,
    only: options.Only = None,
    working_dir: Annotated[
        str | None,
        typer.Option(help="Folder or URI of a .zip with the code; default: nodes have it."),
    ] = None,
    entrypoint: Annotated[
        str, typer.Option(help="The command that nodes run, found on their PATH.")
    ] = "quantfleet",
    poll_seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two polls of the jobs.")
    ] = 5.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what is stale, its cost and schedule, with --on."),
    ] = False,
    on: options.On = None,
    rates: options.Rates = None,
    failing_every: Annotated[
        float | None,
        typer.Option(min=0.001, help="With --dry-run: hours between failures of a worker."),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --failing-every: of other failures.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Make a catalog's stale runs as Ray Jobs, and resume those that failed."""
    from jobs.cli.dry_runs import show_schedule
    from jobs.fleet.simulation import Failures
    from jobs.run_costs import PricedMachine, refuse_without_dry_run

    refuse_without_dry_run(on, rates, dry_run=dry_run)
    if failing_every is not None and not dry_run:
        raise PipelineError(f"--failing-every {failing_every:g}: add --dry-run, which heeds it")
    if dry_run and on is None:
        raise PipelineError(
            "--dry-run: a dashboard does not say what machines there are; name workers with --on, "
            "such as --on 8xH100, or use quantfleet nightly --dry-run --address"
        )
    whole, catalog, root = _opened(file, only)
    if dry_run:
        failures = None if failing_every is None else Failures(3600 * failing_every, seed)
        priced = PricedMachine.of(on, rates)
        show_schedule(
            *(catalog, root, priced, failures),
            at_once=at_once,
            poll_seconds=poll_seconds,
            as_json=as_json,
        )
    from jobs.fleet.nightly import (
        Survey,
        exit_code_of,
        night_entries,
        outcomes_table,
        refuse_impossible,
    )
    from jobs.fleet.nights import Clock
    from jobs.fleet.remembering import remembering
    from jobs.fleet.staleness import decide
    from jobs.fleet.submission import (
        Submission,
        exit_code_of_tasks,
        night_entries_of_tasks,
        tasks_table,
        watch_tasks,
    )
    from pipeline.executor.ray_jobs import RayJobs

    jobs = RayJobs(address, working_dir=working_dir)
    began = Clock.started()
    with status("looking for stale runs"):
        survey = Survey.of(decide(root, catalog, save_verified=True))
    refuse_impossible(root, survey)
    others = survey.others
    submission = Submission(
        root=root,
        jobs=jobs,
        decisions=survey.stale.values(),
        at_once=at_once,
        attempts=attempts,
        poll_seconds=poll_seconds,
        entrypoint=entrypoint,
    )
    if wait:
        with (
            remembering(
                root,
                whole,
                file,
                began,
                len(survey.outcomes),
                lambda: itertools.chain(
                    night_entries_of_tasks(submission.tasks), night_entries(others)
                ),
            ),
            watch_tasks(survey.outcomes) as show,
        ):
            submission.finish(show)
    else:
        submission.step()
    jobs_json = [task.to_dict() for task in submission.tasks]
    others_json = [outcome.to_dict() for outcome in others]
    if as_json:
        print_json({"jobs": jobs_json, "others": others_json})
    else:
        log_event("jobs", "", {"jobs": jobs_json}, table=tasks_table(submission.tasks))
        log_event("others", "", {"others": others_json}, table=outcomes_table(others))
        waiting = sum(1 for task in submission.tasks if task.phase == "waiting")
        if waiting:
            more = f"{waiting} run(s) wait for other jobs to end; submit again, or use --wait"
            log_event("waiting", more)
    raise typer.Exit(exit_code_of_tasks(submission.tasks) or exit_code_of(others))


@app.command()
def cancel(
    name: Annotated[str, typer.Argument(help="A request's id, or a job's.")],
    address: options.Dashboard,
    as_json: options.Json = False,
) -> None:
    """Stop a request's Ray Jobs; the run can be resumed."""
    from jobs.fleet.submission import stop_jobs
    from pipeline.executor.ray_jobs import RayJobs

    stopped = stop_jobs(RayJobs(address), name)
    if not stopped:
        raise PipelineError(f"{name}: no such job is running at {address}; nothing was stopped")
    if as_json:
        print_json(stopped)
    for submission_id in stopped:
        log_event("stopping", f"stopping {submission_id}", {"job": submission_id})


@app.command()
def fulfil(
    request: Annotated[str, typer.Argument(help="URL of a request, below a catalog's root.")],
    address: options.Address = None,
    keep_every: options.KeepEvery = 8,
    wait: options.Wait = True,
    lease_seconds: options.LeaseSeconds = 60.0,
    as_json: options.Json = False,
) -> None:
    """Fulfil one request: quantize, evaluate, verify, judge, publish."""
    from jobs import execute
    from jobs.catalog.request import load_request
    from jobs.fleet import fulfil as fulfilling
    from jobs.fleet.kept_workers import kept_workers

    root, loaded = load_request(request)
    driven = execute.DriverOptions(keep_every=keep_every, wait=wait, lease_seconds=lease_seconds)
    # A composition may have to make the runs that it is made of.
    with kept_workers(partial(execute.open_compute, address=address)) as compute:
        done = fulfilling.fulfil(root, loaded, compute, driven)
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
            f"{loaded.request_id} is not good enough: {'; '.join(done.verdict.failures)}; it is "
            "kept, and what was published before stays"
        )


@app.command("status")
def show_status(
    what: Annotated[
        str, typer.Argument(help="A catalog's file, or the URL of its root or of a run.")
    ],
    as_json: options.Json = False,
) -> None:
    """Show the state of runs and releases, from storage alone."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.fleet.status import run_row, status_table
    from jobs.fleet.status import status as find_status
    from jobs.reachable import reachable
    from pipeline.plan import PLAN_KEY
    from pipeline.run import lease

    if what.endswith((".yaml", ".yml")):
        catalog = read_catalog(what)
        rows = find_status(reachable(catalog.root_url), catalog)
    else:
        store = reachable(what)
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
    from jobs.reachable import reachable
    from pipeline.run.events import read_events

    events = read_events(reachable(run))
    if not events:
        raise PipelineError(
            f"{run}: no events are there; give a run, as quantfleet status lists them"
        )
    if as_json:
        print_json([event.to_dict() for event in events])
    else:
        typer.echo(visible("\n".join(event.line() for event in events)))


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
    from jobs.reachable import reachable

    _print_current(releases.promote(reachable(root), model, recipe, run_id), as_json=as_json)


@app.command()
def rollback(
    root: options.CatalogRoot,
    model: options.ModelName,
    recipe: options.RecipeName,
    as_json: options.Json = False,
) -> None:
    """Make the previous release the current one; nothing is deleted."""
    from jobs.publish import releases
    from jobs.reachable import reachable

    _print_current(releases.rollback(reachable(root), model, recipe), as_json=as_json)


def _print_current(current: Current, *, as_json: bool) -> None:
    release = current.release
    if as_json:
        print_json(current.content())
    else:
        log_event(
            "current",
            f"{release.model} in {release.recipe_name}: release {release.number} is current, run "
            f"{release.run_id}",
        )


def _opened(file: str, only: list[str] | None) -> tuple[Catalog, Catalog, ObjectStore]:
    """A checked catalog, what of it was chosen, and its root, which was reached."""
    from jobs.catalog.catalog_file import read_catalog
    from jobs.catalog.request import REQUESTS_PREFIX
    from jobs.reachable import reachable

    with waiting("reading the catalog"):
        whole = catalog = read_catalog(file)
    if only:
        unknown = sorted(set(only) - {entry.name for entry in catalog.entries})
        if unknown:
            raise PipelineError(f"{file}: no model {', '.join(unknown)}; correct --only")
        chosen = tuple(entry for entry in catalog.entries if entry.name in only)
        catalog = dataclasses.replace(catalog, entries=chosen)
    with waiting("looking at the catalog's root"):
        return whole, catalog, reachable(catalog.root_url, REQUESTS_PREFIX.rstrip("/"))
