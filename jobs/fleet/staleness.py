"""Decides which of a catalog's runs must be made, or made again, and why: from metadata alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jobs.catalog.catalog_file import Catalog
from jobs.catalog.catalog_runs import CatalogRun, catalog_runs
from jobs.catalog.request import (
    EVALUATED_ON,
    ComposedOf,
    Request,
    request_key,
    run_prefix,
    run_store,
)
from jobs.publish.releases import Current, find_current
from jobs.publish.verdict import Verdict, find_verdict
from jobs.publish.verified_files import ArtifactCheck, check_artifact
from pipeline.canonical import digest_of
from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError
from pipeline.plan import PLAN_KEY
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore

Freshness = Literal["fresh", "stale", "gate failed", "set aside", "unreachable"]
"""Of one run of a catalog: "fresh" is published as requested, and intact; "stale" must be made;
"gate failed" was made, and would only fail again; "set aside" was published, and a person replaced
it; "unreachable" cannot be examined."""

_NUM_THREADS = 32
_RUNS_AT_ONCE = 512
_FOLDERS_TOGETHER = 64
"""Listed by one thread."""
_MAX_FILES_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether one run must be made.

    Attributes:
        reasons: why it is not fresh.
        bytes_read: of sources and artifacts, to decide.
        release: number of what is published; None before the first release.
        quality: of what is published, or of what failed its gate.
    """

    run: CatalogRun
    state: Freshness
    reasons: tuple[str, ...] = ()
    bytes_read: int = 0
    release: int | None = None
    quality: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def request(self) -> Request:
        assert self.run.request is not None
        return self.run.request


def decide(root: ObjectStore, catalog: Catalog, *, save_verified: bool) -> Iterator[Decision]:
    """Decide for every run of a catalog, in its order, some hundred at a time.

    Storage is asked for what is published under each name, and for the files of the runs that this
    names, by pages (see `ObjectStore.folders`); nothing else below the root is listed.

    Args:
        save_verified: record which artifacts were read again and found intact, so that the next
            time they need not be.
    """
    runs = catalog_runs(catalog)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        def decide_or_report(looked_up: tuple[CatalogRun, _Stored | PipelineError]) -> Decision:
            run, stored = looked_up
            try:
                if isinstance(stored, PipelineError):
                    raise stored
                return decide_run(root, run, save_verified=save_verified, stored=stored)
            except PipelineError as problem:
                return Decision(
                    run=run, state="unreachable", reasons=(str(problem),), bytes_read=run.bytes_read
                )

        while some := tuple(itertools.islice(runs, _RUNS_AT_ONCE)):
            found = _look_up(root, some, pool)
            yield from pool.map(decide_or_report, zip(some, found, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What is known of one request.

    Attributes:
        current: what is published.
        files: of the published run; without one, of the request's own.
    """

    current: Current | None
    files: Mapping[str, Version]


def _look_up(
    root: ObjectStore, runs: Sequence[CatalogRun], pool: ThreadPoolExecutor
) -> list[_Stored | PipelineError]:
    """What is stored of each of some runs; or why it is not known."""
    currents = list(pool.map(partial(_current_or_problem, root), runs))
    run_ids = [
        _examined(run.request, found)
        for run, found in zip(runs, currents, strict=True)
        if run.request is not None and not isinstance(found, PipelineError)
    ]
    prefixes = sorted({run_prefix(run_id) for run_id in run_ids})
    groups = [
        prefixes[i : i + _FOLDERS_TOGETHER] for i in range(0, len(prefixes), _FOLDERS_TOGETHER)
    ]
    listed: dict[str, Mapping[str, Version]] = {}
    for folders in pool.map(lambda group: tuple(root.folders(group)), groups):
        listed.update(folders)
    stored: list[_Stored | PipelineError] = []
    for run, found in zip(runs, currents, strict=True):
        if isinstance(found, PipelineError):
            stored.append(found)
            continue
        assert run.request is not None
        files = listed[run_prefix(_examined(run.request, found))]
        stored.append(_Stored(current=found, files=files))
    return stored


def _examined(request: Request, current: Current | None) -> str:
    """The run whose files tell how a request stands."""
    return request.run_id if current is None else current.release.run_id


def _current_or_problem(root: ObjectStore, run: CatalogRun) -> Current | PipelineError | None:
    if run.request is None:
        assert run.problem is not None
        return run.problem
    try:
        return find_current(root, run.request.model, run.request.recipe_name)
    except PipelineError as problem:
        return problem


def decide_run(
    root: ObjectStore, run: CatalogRun, *, save_verified: bool, stored: _Stored | None = None
) -> Decision:
    """Decide for one run.

    Args:
        stored: what is known of it already.

    Raises:
        PipelineError: it cannot be examined.
    """
    request = run.request
    if request is None:
        assert run.problem is not None
        raise run.problem
    if stored is None:
        current = find_current(root, request.model, request.recipe_name)
        files = run_store(root, _examined(request, current)).versions()
        stored = _Stored(current=current, files=files)
    current = stored.current
    verdict, check = None, ArtifactCheck()
    if current is None or current.release.request_id != request.request_id:
        verdict = find_verdict(root, request.request_id)
    state: Freshness
    if current is None:
        state, reasons = _never_published(verdict, is_started=PLAN_KEY in stored.files)
    else:
        release = current.release
        check = check_artifact(
            root, release.run_id, release.manifest_sha256, stored.files, exports=release.exports
        )
        if save_verified and check.verified is not None:
            check.verified.save(root)
        state, reasons = _published(root, request, current, verdict, check)
    if state == "fresh":
        reasons = tuple(_missing_aliases(root, request))
        state = "stale" if reasons else "fresh"
    return Decision(
        run=run,
        state=state,
        reasons=reasons,
        bytes_read=run.bytes_read + check.bytes_read,
        release=None if current is None else current.release.number,
        quality=_quality(state, current, verdict),
    )


def _quality(
    state: Freshness, current: Current | None, verdict: Verdict | None
) -> dict[str, Any] | None:
    judged = {"fresh": None if current is None else current.release, "gate failed": verdict}
    found = judged.get(state)
    return None if found is None else found.quality


def _never_published(
    verdict: Verdict | None, *, is_started: bool
) -> tuple[Freshness, tuple[str, ...]]:
    if verdict is not None and not verdict.passed:
        return "gate failed", verdict.failures
    if verdict is not None:
        return "stale", ("passed its gate, not published yet",)
    return "stale", ("started, not finished or judged" if is_started else "never run",)


def _published(
    root: ObjectStore,
    request: Request,
    current: Current,
    verdict: Verdict | None,
    check: ArtifactCheck,
) -> tuple[Freshness, tuple[str, ...]]:
    release = current.release
    if release.request_id == request.request_id:
        return ("stale", (check.problem,)) if check.problem else ("fresh", ())
    if request.run_id in current.set_aside:
        return "set aside", (
            f"a person made release {release.number} current; to undo that: quantfleet promote "
            f"{root.root_url} {request.model} {request.recipe_name} {request.run_id}",
        )
    try:
        fulfilled = Request.read(root, request_key(release.request_id))
    except (MissingObjectError, DamagedObjectError):
        reasons: tuple[str, ...] = ("the request that was published cannot be read",)
    else:
        reasons = tuple(changes(fulfilled, request)) or ("requested differently",)
    if verdict is not None and not verdict.passed:
        # What is published is older than this request, and stays.
        return "gate failed", (*verdict.failures, *reasons)
    return "stale", (*reasons, *filter(None, [check.problem]))


def changes(before: Request, now: Request) -> Iterator[str]:
    """What differs between two requests for the same model and recipe, in words."""
    if found := _differing(before.source, now.source):
        yield f"source changed: {found}"
    if before.recipe | {"calibration": None} != now.recipe | {"calibration": None}:
        yield "recipe changed"
    yield from _changes_of_composition(before.composed_of, now.composed_of)
    if before.recipe.get("calibration") != now.recipe.get("calibration"):
        yield "calibration changed: its settings"
    elif found := _differing(before.texts, now.texts):
        yield f"calibration changed: {found}"
    newer = [
        f"{name} {before.versions.get(name)} → {now.versions.get(name)}"
        for name in sorted({*before.versions, *now.versions})
        if before.versions.get(name) != now.versions.get(name)
    ]
    if newer:
        yield f"versions changed: {', '.join(newer)}"
    if any(getattr(before, name) != getattr(now, name) for name in EVALUATED_ON):
        yield "evaluation changed: its settings"
    elif found := _differing(before.evaluation, now.evaluation):
        yield f"evaluation changed: {found}"
    if before.exports != now.exports:
        yield "exports changed: their settings"
    elif found := _differing(before.exports_like, now.exports_like):
        yield f"exports changed: {found}"
    for name, change in (
        ("gate", "gate changed"),
        ("needs", "resources changed"),
        ("source_url", "source moved"),
        ("aliases", "aliases changed"),
        ("keep", "retention changed"),
    ):
        if getattr(before, name) != getattr(now, name):
            yield change


def _changes_of_composition(before: ComposedOf | None, now: ComposedOf | None) -> Iterator[str]:
    """What differs between what two results are composed of, in words."""
    if before is None or now is None:
        if before is not now:
            yield "composed" if before is None else "no longer composed"
        return
    if before.target != now.target:
        yield "target changed"
    if before.recipes != now.recipes:
        ours, theirs = (
            {recipe["name"]: digest_of(recipe) for recipe in one.recipes} for one in (now, before)
        )
        yield f"recipes changed: {_differing(theirs, ours) or 'their order'}"
    names = ("measure_texts", "measure_windows", "by_layers")
    if any(getattr(before, name) != getattr(now, name) for name in names):
        yield "measured otherwise: its settings"
    elif found := _differing(before.measured_on, now.measured_on):
        yield f"measured otherwise: {found}"


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The files whose tokens differ, in words; "" if none does."""
    names = []
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            what = "" if file in before and file in now else " added" if file in now else " removed"
            names.append(f"{file}{what}")
    more = f" and {len(names) - _MAX_FILES_NAMED} more" if len(names) > _MAX_FILES_NAMED else ""
    return ", ".join(names[:_MAX_FILES_NAMED]) + more


def _missing_aliases(root: ObjectStore, request: Request) -> Iterator[str]:
    """The aliases under which the current release is not published yet, in words."""
    for alias in request.aliases:
        current = find_current(root, alias, request.recipe_name)
        if current is None or (
            current.release.request_id != request.request_id
            and request.run_id not in current.set_aside
        ):
            yield f"not published as {alias}"
