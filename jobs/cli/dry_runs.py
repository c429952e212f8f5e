"""What dry runs of catalogs print: what would be made, what it would cost, and when."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Never

import typer

from jobs import execute
from jobs.catalog.catalog_file import Catalog
from jobs.fleet.forecast import show
from jobs.fleet.nightly import Outcome, Survey, exit_code_of, foresee, outcomes_table
from jobs.fleet.schedule import schedule_json, schedule_of, schedule_table
from jobs.fleet.simulation import Failures
from jobs.fleet.staleness import decide
from jobs.logging import STDERR, is_json, log_event, print_json, print_table, status
from jobs.run_costs import PricedMachine
from pipeline.storage.object_store import ObjectStore


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print what became of each run, and what those that are to be made would take."""
    if not is_json():  # each was logged when it was known
        print_table(STDERR, outcomes_table(outcomes))
        show([(o.name, o.forecast) for o in outcomes if o.forecast is not None])


def show_schedule(
    catalog: Catalog,
    root: ObjectStore,
    priced: PricedMachine,
    failures: Failures | None,
    *,
    at_once: int,
    poll_seconds: float,
    as_json: bool,
) -> Never:
    """Print what a catalog's stale runs would take, and when `submit` would make each; then end.

    Args:
        priced: machines that the user names.
        at_once: jobs alive at the same time.
        poll_seconds: between two polls of the jobs.
    """
    assert priced.named is not None
    with status("looking for stale runs"):
        survey = Survey.of(decide(root, catalog, save_verified=False))
    with status("working out what each run would take"):
        plan_only = partial(execute.open_compute, plan_only=True)
        outcomes = foresee(root, survey, plan_only, priced, in_one_pass=False)
    schedule = schedule_of(
        outcomes,
        priced.named.number,
        at_once=at_once,
        poll_seconds=poll_seconds,
        failures=failures,
    )
    found = schedule_json(schedule)
    if as_json:
        print_json({"runs": [outcome.to_dict() for outcome in outcomes], "schedule": found})
    else:
        show_outcomes(outcomes)
        table = schedule_table(schedule, priced.named.machine.name)
        log_event("schedule", "", {"schedule": found}, table=table)
    raise typer.Exit(exit_code_of(outcomes))
