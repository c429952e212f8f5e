"""What of a catalog must be made, or made again, and why: decided from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from jobs.catalog.catalog_file import Catalog
from jobs.catalog.request import RUNS_PREFIX, Request, request_key, run_store
from jobs.catalog.requests import Wanted, wanted_runs
from jobs.publish.releases import Current, find_current
from jobs.publish.verdict import Verdict, find_verdict
from jobs.publish.verified_files import Look, look, save_seen
from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError
from pipeline.plan import PLAN_KEY
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore

State = Literal["fresh", "stale", "gate failed", "set aside", "unreachable"]

_AT_ONCE = 16
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether one run is to be done.

    Attributes:
        wanted: what the catalog asks for.
        state: "fresh" is published as wanted, and whole; "stale" is to be done; "gate failed" was
            done, and would only fail again; "set aside" was published, and a person moved away
            from it; "unreachable" cannot be looked at.
        reasons: why it is not fresh.
        bytes_read: of sources and artifacts, in deciding.
        current: what is published; None before the first.
        verdict: on this very request, where it is not what is published; None without one.
    """

    wanted: Wanted
    state: State
    reasons: tuple[str, ...] = ()
    bytes_read: int = 0
    current: Current | None = field(default=None, repr=False)
    verdict: Verdict | None = field(default=None, repr=False)

    @property
    def request(self) -> Request:
        assert self.wanted.request is not None
        return self.wanted.request


def decide(root: ObjectStore, catalog: Catalog, *, note: bool) -> tuple[Decision, ...]:
    """Decide for every run of a catalog, in its order.

    Args:
        root: the catalog's.
        note: write down which artifacts were read again and found whole, so that the next pass
            need not.
    """
    listed = _by_run(root)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return tuple(
            pool.map(lambda one: _decide(root, one, listed, note=note), wanted_runs(catalog))
        )


_Listed = Mapping[str, Mapping[str, Version]]


def _by_run(root: ObjectStore) -> _Listed:
    """The files of all runs, by run: a few requests, instead of one for each."""
    found: dict[str, dict[str, Version]] = {}
    for key, version in root.versions(RUNS_PREFIX).items():
        run_id, _, name = key.removeprefix(RUNS_PREFIX).partition("/")
        found.setdefault(run_id, {})[name] = version
    return found


def _decide(root: ObjectStore, wanted: Wanted, listed: _Listed, *, note: bool) -> Decision:
    try:
        return decision(root, wanted, note=note, listed=listed)
    except PipelineError as problem:
        return Decision(
            wanted=wanted,
            state="unreachable",
            reasons=(str(problem),),
            bytes_read=wanted.bytes_read,
        )


def decision(
    root: ObjectStore, wanted: Wanted, *, note: bool, listed: _Listed | None = None
) -> Decision:
    """Decide for one run.

    Args:
        note: see `decide`.
        listed: files of all runs, where they were listed already.

    Raises:
        PipelineError: it cannot be looked at.
    """
    request = wanted.request
    if request is None:
        assert wanted.problem is not None
        raise wanted.problem
    current = find_current(root, request.model, request.recipe_name)
    verdict, seen = None, Look()
    if current is None or current.release.request_id != request.request_id:
        verdict = find_verdict(root, request.request_id)
    if current is None:
        state, reasons = _never_published(root, request, verdict)
    else:
        release = current.release
        files = None if listed is None else listed.get(release.run_id, {})
        seen = look(root, release.run_id, release.manifest_sha256, files)
        if note and seen.seen is not None:
            save_seen(root, seen.seen)
        state, reasons = _published(root, request, current, verdict, seen)
    if state == "fresh":
        reasons = tuple(_unnamed(root, request))
        state = "stale" if reasons else "fresh"
    return Decision(
        wanted=wanted,
        state=state,
        reasons=reasons,
        bytes_read=wanted.bytes_read + seen.bytes_read,
        current=current,
        verdict=verdict,
    )


def _never_published(
    root: ObjectStore, request: Request, verdict: Verdict | None
) -> tuple[State, tuple[str, ...]]:
    if verdict is not None and not verdict.passed:
        return "gate failed", verdict.failures
    if verdict is not None:
        return "stale", ("passed its gate, not published yet",)
    begun = run_store(root, request.run_id).exists(PLAN_KEY)
    return "stale", ("begun, not finished or judged" if begun else "never run",)


def _published(
    root: ObjectStore,
    request: Request,
    current: Current,
    verdict: Verdict | None,
    seen: Look,
) -> tuple[State, tuple[str, ...]]:
    release = current.release
    if release.request_id == request.request_id:
        return ("stale", (seen.problem,)) if seen.problem else ("fresh", ())
    if request.run_id in current.set_aside:
        return "set aside", (
            f"release {release.number} was made current by hand; quantfleet promote "
            f"{root.root_url} {request.model} {request.recipe_name} {request.run_id} undoes that",
        )
    reasons = _changes(root, release.request_id, request)
    if verdict is not None and not verdict.passed:
        # What is published is older than what is wanted, and stays.
        return "gate failed", (*verdict.failures, *reasons)
    return "stale", (*reasons, *filter(None, [seen.problem]))


def _changes(root: ObjectStore, request_id: str, wanted: Request) -> tuple[str, ...]:
    """What differs between the request that was fulfilled and the one that is wanted."""
    try:
        before = Request.read(root, request_key(request_id))
    except (MissingObjectError, DamagedObjectError):
        return ("what was asked for when it was published cannot be read",)
    return tuple(changes(before, wanted)) or ("asked for otherwise",)


def changes(before: Request, now: Request) -> Iterator[str]:
    """Say what differs between two requests for the same model and recipe."""
    if found := _differing(before.source, now.source):
        yield f"source changed: {found}"
    calibration = "calibration"
    schemes = [{**r.recipe, calibration: None} for r in (before, now)]
    if schemes[0] != schemes[1]:
        yield "recipe changed"
    if before.recipe[calibration] != now.recipe[calibration]:
        yield "calibration changed: its settings"
    elif found := _differing(before.texts, now.texts):
        yield f"calibration changed: {found}"
    names = sorted({*before.versions, *now.versions})
    newer = [
        f"{name} {before.versions.get(name)} → {now.versions.get(name)}"
        for name in names
        if before.versions.get(name) != now.versions.get(name)
    ]
    if newer:
        yield f"versions changed: {', '.join(newer)}"
    if (before.evaluation_texts, before.evaluation_windows) != (
        now.evaluation_texts,
        now.evaluation_windows,
    ):
        yield "evaluation changed: its settings"
    elif found := _differing(before.evaluation, now.evaluation):
        yield f"evaluation changed: {found}"
    if before.gate != now.gate:
        yield "gate changed"
    if before.needs != now.needs:
        yield "resources changed"
    if before.source_url != now.source_url:
        yield "source moved"
    if before.aliases != now.aliases:
        yield "aliases changed"
    if before.keep != now.keep:
        yield "retention changed"


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The files whose tokens differ, in words; "" where none does."""
    said = []
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            what = "" if file in before and file in now else " added" if file in now else " removed"
            said.append(f"{file}{what}")
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return ", ".join(said[:_SHOWN]) + more


def _unnamed(root: ObjectStore, request: Request) -> Iterator[str]:
    """Aliases under which what is published is not published yet."""
    for alias in request.aliases:
        current = find_current(root, alias, request.recipe_name)
        if current is None or (
            current.release.request_id != request.request_id
            and request.run_id not in current.set_aside
        ):
            yield f"not published as {alias}"
