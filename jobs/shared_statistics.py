"""Statistics of the float model that a run needs: found, or captured before it solves anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from jobs.logging import log_event
from pipeline.errors import DamagedObjectError, MissingObjectError, StatisticsError
from pipeline.float_statistics import statistics_plan, statistics_store
from pipeline.plan import PLAN_KEY, Plan, TokensPlan, read_plan
from pipeline.run.claim import claim
from pipeline.run.commits import Finding, damaged_files, quarantine, read_manifest
from pipeline.run.lease import Lease
from pipeline.run.records import MANIFEST_KEY, RECORDS_PREFIX, Manifest, record_key
from pipeline.run.statistics_users import note_user
from pipeline.storage.object_store import ObjectStore

_T = TypeVar("_T")
_MOST_REPAIRS = 3


def with_statistics(
    plan: Plan,
    store: ObjectStore,
    acquire_lease: Callable[[ObjectStore], Lease],
    capture: Callable[[Plan, ObjectStore, Lease], object],
    solve: Callable[[], _T],
) -> _T:
    """Solve a run once its statistics are there, and again once what is damaged was made anew.

    Args:
        store: opened at the run's root.
        acquire_lease: makes this process the only driver of the run at a store's root.
        capture: carries out the plan of statistics that it is given, claimed in that store.
        solve: drives the run's own blocks; raises StatisticsError if statistics cannot be used.

    Raises:
        StatisticsError: they are damaged again and again.
    """
    if not plan.uses_float_statistics or _is_solved(plan, store):
        return solve()
    found, wanted, tokens = (
        statistics_store(plan, store.root_url),
        statistics_plan(plan),
        plan.tokens,
    )
    assert tokens is not None

    def capture_missing(*, verify: bool) -> None:
        with acquire_lease(found) as held:
            if verify:
                damaged = _damaged(found, tokens)
                for finding in damaged:
                    log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
                held.check()
                quarantine(found, damaged)
            elif found.exists(MANIFEST_KEY):
                return  # by the driver that was waited for
            text = "captured once, for all recipes of the model with the same tokens"
            log_event("statistics", f"{found.root_url}: {text}")
            windows = store.get(tokens.key, sha256=tokens.digest)
            found.create(tokens.key, windows)  # also where they are no longer
            capture(claim(found, wanted, windows), found, held)

    note_user(found, store.root_url)
    if found.exists(MANIFEST_KEY):
        log_event("statistics", f"{found.root_url}: captured before; nothing to capture")
    else:
        capture_missing(verify=False)
    repairs = 0
    while True:
        try:
            return solve()
        except StatisticsError as error:
            repairs += 1
            if repairs > _MOST_REPAIRS:
                raise
            log_event("damaged", f"{error}; they are made again", level=logging.WARNING)
            capture_missing(verify=True)


def _is_solved(plan: Plan, store: ObjectStore) -> bool:
    """Whether all parts that statistics are for are committed, as far as their records tell."""
    present = store.list(RECORDS_PREFIX)
    return all(record_key(part.part) in present for part in plan.parts if part.groups)


def _damaged(found: ObjectStore, tokens: TokensPlan) -> list[Finding]:
    """What cannot be used of statistics that were captured before."""
    findings = []
    try:
        found.get(tokens.key, sha256=tokens.digest)
    except MissingObjectError:
        pass  # written again
    except DamagedObjectError as error:
        findings.append(Finding(key=tokens.key, problem=str(error), is_damaged=True))
    for key, read in ((PLAN_KEY, read_plan), (MANIFEST_KEY, read_manifest)):
        try:
            record = read(found)
        except MissingObjectError:
            continue
        except DamagedObjectError as error:
            findings.append(Finding(key=key, problem=str(error), is_damaged=True))
            continue
        if isinstance(record, Manifest):
            findings += damaged_files(found, record)
    return findings
