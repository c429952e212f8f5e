"""Statistics of the float model that a run needs: where, and captured before it solves anything."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from jobs.logging import log_event
from pipeline.errors import (
    DamagedObjectError,
    LeaseLostError,
    MissingObjectError,
    PipelineError,
    StatisticsError,
)
from pipeline.float_statistics import STATISTICS_FOLDER, statistics_plan, statistics_store
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.recipe.recipe import Recipe
from pipeline.run.commits import Finding, damaged_files, quarantine
from pipeline.run.lease import Lease
from pipeline.run.records import MANIFEST_KEY, RECORDS_PREFIX, Manifest, record_key
from pipeline.run.statistics_users import note_user
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.overlap import is_inside
from pipeline.tokens_plan import TokensPlan

_T = TypeVar("_T")
_MOST_REPAIRS = 3
_MOST_LOSSES = 3


def check_statistics_folder(
    statistics_url: str, source_url: str, output_url: str, recipe: Recipe
) -> None:
    """Refuse a folder for statistics that its user cannot mean; nothing is opened.

    Raises:
        PipelineError: the recipe uses none, or what is written there would be taken for something
            else.
    """
    named = f"--statistics {statistics_url}"
    if not recipe.uses_float_statistics:
        raise PipelineError(
            f"{named}: recipe {recipe.name} uses none; give its calibration statistics: float, or "
            "leave --statistics out"
        )
    if is_inside(statistics_url, source_url):
        raise PipelineError(
            f"{named}: lies inside the preset's own folder, {source_url}; name a folder elsewhere"
        )
    own = f"{output_url.rstrip('/')}/{STATISTICS_FOLDER}"
    if is_inside(statistics_url, output_url) and not is_inside(statistics_url, own):
        raise PipelineError(
            f"{named}: lies inside the output, among the run's own files; name a folder elsewhere, "
            f"or leave --statistics out for {own}"
        )


def check_same_folder(statistics_url: str, claimed: Plan, store: ObjectStore) -> None:
    """Refuse to go on with other statistics than those that a run was started with.

    Args:
        claimed: the plan at the run's root, which names their folder.

    Raises:
        PipelineError: the folder is another.
    """
    theirs = claimed.statistics_url or f"{store.root_url}/{STATISTICS_FOLDER}"
    if not (is_inside(statistics_url, theirs) and is_inside(theirs, statistics_url)):
        raise PipelineError(
            f"--statistics {statistics_url}: the run at {store.root_url} was started with those in "
            f"{theirs}; leave --statistics out, or choose another --output"
        )


def captured_before(plan: Plan, run_url: str) -> bool:
    """Whether the statistics that a run would use are finished already, as far as metadata tell.

    Args:
        plan: of the run; of a dry run's, which names no weights, files of the same sizes are taken
            for the same.
        run_url: the run's root.
    """
    if not plan.uses_float_statistics:
        return False
    folder = open_store(plan.statistics_url or f"{run_url}/{STATISTICS_FOLDER}")
    wanted = statistics_plan(plan)
    for key in folder.list():
        digest, _, name = key.partition("/")
        if name != MANIFEST_KEY:
            continue
        try:
            found = read_plan(open_store(f"{folder.root_url}/{digest}"))
        except (DamagedObjectError, MissingObjectError):
            continue  # which would be captured again
        if found.makes == "statistics" and len(found.parts) == len(wanted.parts):
            same = wanted.of_source([part.source_sha256 for part in found.parts])
            if same.digest == found.digest:
                return True
    return False


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
        acquire_lease: makes this process the only driver of the run at a store's root. Where
            another takes over a capture, it is called again, to wait for that one.
        capture: carries out the plan of statistics that it is given, which is in that store.
        solve: drives the run's own blocks; raises StatisticsError if statistics cannot be used.

    Raises:
        StatisticsError: they are damaged again and again.
        LeaseLostError: other drivers took over captures again and again.
    """
    if not plan.uses_float_statistics:
        return solve()
    found, wanted, tokens = (
        statistics_store(plan, store.root_url),
        statistics_plan(plan),
        plan.tokens,
    )
    assert tokens is not None

    def capture_missing(*, verify: bool) -> None:
        note_user(found, store.root_url)  # before anything that may be swept is looked for
        if not verify and found.exists(MANIFEST_KEY):
            log_event("statistics", f"{found.root_url}: captured before; nothing to capture")
            return
        with acquire_lease(found) as held:
            if not verify and found.exists(MANIFEST_KEY):
                return  # by the driver that was waited for
            # Whoever held the lease may have swept it, the note among it.
            note_user(found, store.root_url)
            damaged = _damaged(found, wanted, tokens)
            for finding in damaged:
                log_event("damaged", f"made again: {finding.problem}", level=logging.WARNING)
            held.check()
            quarantine(found, damaged)
            text = "captured once, for all recipes of the model with the same tokens"
            log_event("statistics", f"{found.root_url}: {text}")
            windows = store.get(tokens.key, sha256=tokens.digest)
            found.create(tokens.key, windows)
            # Whatever else is there, the folder's name says that it is of this plan. A driver that
            # woke up late may have written it, with its own place of the source.
            with contextlib.suppress(FileExistsError):
                found.create(PLAN_KEY, wanted.to_json())
            capture(read_plan(found), found, held)

    def captured(*, verify: bool) -> None:
        losses = 0
        while True:
            try:
                capture_missing(verify=verify)
            except LeaseLostError:
                losses += 1
                if losses == _MOST_LOSSES:
                    raise
                # It captures the same; the run itself is still this driver's.
                text = "another driver took over, since this one was silent; waiting for that one"
                log_event("waiting", f"{found.root_url}: {text}", level=logging.WARNING)
            else:
                return

    if not _is_solved(plan, store):
        captured(verify=False)
    repairs = 0
    while True:
        try:
            return solve()
        except StatisticsError as error:
            repairs += 1
            if repairs > _MOST_REPAIRS:
                raise
            log_event("damaged", f"{error}; they are made again", level=logging.WARNING)
            captured(verify=True)


def _is_solved(plan: Plan, store: ObjectStore) -> bool:
    """Whether all parts that statistics are for are committed, as far as their records tell.

    Of one that turns out damaged they are needed nevertheless.
    """
    present = store.list(RECORDS_PREFIX)
    return all(record_key(part.part) in present for part in plan.parts if part.groups)


def _damaged(found: ObjectStore, wanted: Plan, tokens: TokensPlan) -> list[Finding]:
    """What cannot be used of statistics that were captured before, in part or whole."""
    findings = []
    try:
        found.get(tokens.key, sha256=tokens.digest)
    except MissingObjectError:
        pass  # written again
    except DamagedObjectError as error:
        findings.append(Finding(key=tokens.key, problem=str(error), is_damaged=True))
    kinds: tuple[tuple[str, type[Plan | Manifest]], ...]
    kinds = (PLAN_KEY, Plan), (MANIFEST_KEY, Manifest)
    for key, kind in kinds:
        try:
            record = kind.read(found, key)
        except MissingObjectError:
            continue
        except DamagedObjectError as error:
            findings.append(Finding(key=key, problem=str(error), is_damaged=True))
            continue
        if isinstance(record, Manifest):
            findings += damaged_files(found, record)
        elif record.digest != wanted.digest:
            problem = f"{found.url(key)} is the plan of other statistics"
            findings.append(Finding(key=key, problem=problem, is_damaged=True))
    return findings
