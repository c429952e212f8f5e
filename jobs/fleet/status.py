"""The status of a catalog's runs and releases, from storage alone."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from jobs.catalog.catalog_file import Catalog
from jobs.catalog.request import REQUESTS_PREFIX, Request, request_key, run_store
from jobs.logging import MOST_ROWS, url_name
from jobs.publish.published_exports import PublishedExport
from jobs.publish.releases import find_current, published_names
from jobs.publish.verdict import JudgedRun, find_verdict, quality_text
from jobs.quantities import duration, size
from pipeline.errors import DamagedObjectError, PipelineError
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.run import lease
from pipeline.run.events import EVENTS_PREFIX, read_events, seconds_per_part
from pipeline.run.records import MANIFEST_KEY, RECORDS_PREFIX, is_weights_file
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore

_NUM_THREADS = 16
_REQUEST_ID = re.compile(r"(?P<name>.+)-[0-9a-f]{12}")

RunPhase = Literal["not started", "planning", "running", "silent", "stopped", "finished"]
"""A "running" run has a driver that reported within a lease's term; a "silent" one has a driver
that did not, but has not said that it ended either; a "stopped" one has no driver."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far one run is.

    Attributes:
        parts_done, parts: files of weights that are committed, and how many there will be.
        seconds_a_part, seconds_left: average of the latest driver, and what it needs at that pace.
        heartbeat_seconds: since a driver last reported, by the clocks of store and reader.
        source_bytes, stored_bytes: size of the source's weights, and of those that are committed.
        text: the latest driver's last message, or what is wrong.
    """

    state: RunPhase
    parts_done: int = 0
    parts: int | None = None
    seconds_a_part: float | None = None
    seconds_left: float | None = None
    heartbeat_seconds: float | None = None
    source_bytes: int | None = None
    stored_bytes: int | None = None
    text: str = ""


def run_status(store: ObjectStore, *, term_seconds: float = lease.TERM_SECONDS) -> RunStatus:
    """Examine the run at the store's root; no cluster needs to be alive."""
    known = store.versions()
    done = sum(1 for key in known if key.startswith(RECORDS_PREFIX))
    stored = sum(one.size_bytes for key, one in known.items() if is_weights_file(key))
    beats = [version.modified for key, version in known.items() if key.startswith(lease.PREFIX)]
    heartbeat = max(0.0, time.time() - max(beats)) if beats else None
    found = RunStatus(
        state="stopped", parts_done=done, heartbeat_seconds=heartbeat, stored_bytes=stored
    )
    if MANIFEST_KEY in known:
        return dataclasses.replace(found, state="finished", parts=done)
    driven: RunPhase = "stopped"
    if not lease.find_latest(store).is_over:
        driven = "silent" if heartbeat is None or heartbeat > term_seconds else "running"
    if PLAN_KEY not in known:
        unplanned: RunPhase = "planning" if driven == "running" else "not started"
        return RunStatus(state=unplanned, heartbeat_seconds=heartbeat)
    try:
        plan = read_plan(store)
    except DamagedObjectError as error:
        return dataclasses.replace(found, text=str(error))
    events = read_events(store, sorted(key for key in known if key.startswith(EVENTS_PREFIX))[-1:])
    texts = [str(event.values["text"]) for event in events if event.values.get("text")]
    pace = seconds_per_part(events)
    left = pace * (len(plan.parts) - done) if pace is not None and driven == "running" else None
    return dataclasses.replace(
        found,
        state=driven,
        parts=len(plan.parts),
        seconds_a_part=pace,
        seconds_left=left,
        source_bytes=sum(part.source_bytes for part in plan.parts),
        text=texts[-1] if texts else "",
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One release, or one run that was requested and is not published.

    Attributes:
        run: None if only the release is known.
        quality: what `jobs.publish.verdict.quality_figures` returns.
        gate: the limits that it was judged by.
        exports: that were published with a release.
        text: why the gate failed, or what is wrong.
    """

    model: str
    recipe: str
    state: RunPhase | Literal["published", "gate failed", "damaged"]
    request_id: str | None = None
    run_id: str | None = None
    release: int | None = None
    run: RunStatus | None = None
    source_bytes: int | None = None
    stored_bytes: int | None = None
    quality: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    exports: tuple[PublishedExport, ...] = ()
    text: str = ""


def status(root: ObjectStore, catalog: Catalog | None = None) -> tuple[Row, ...]:
    """Every current release below a catalog's root, and every run that was requested after it.

    Args:
        catalog: its models only, with a row for those that have nothing yet.
    """
    names = None if catalog is None else catalog_names(catalog)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        published = [one for one in published_names(root) if names is None or one in names]
        rows = list(pool.map(lambda one: _released(root, *one), published))
        keys = _unpublished_requests(root.versions(REQUESTS_PREFIX), rows)
        rows += filter(None, pool.map(lambda key: _unreleased(root, key, names), keys))
    missing = dict.fromkeys(names or ()).keys() - {(row.model, row.recipe) for row in rows}
    rows += [Row(model=model, recipe=recipe, state="not started") for model, recipe in missing]
    return tuple(sorted(rows, key=lambda row: (row.model, row.recipe, row.state != "published")))


def catalog_names(catalog: Catalog) -> dict[tuple[str, str], None]:
    """Every model and recipe that a catalog asks for, aliases too, in its order."""
    return {
        (name, result): None
        for entry in catalog.entries
        for name in (entry.name, *entry.aliases)
        for result in entry.result_names
    }


def _released(root: ObjectStore, model: str, recipe: str) -> Row:
    try:
        current = find_current(root, model, recipe)
    except PipelineError as problem:
        return Row(model=model, recipe=recipe, state="damaged", text=str(problem))
    if current is None:
        return Row(model=model, recipe=recipe, state="damaged", text="deleted a moment ago")
    text = f"set aside: {', '.join(current.set_aside)}" if current.set_aside else ""
    row = _judged(current.release, "published", text)
    release = current.release
    return dataclasses.replace(row, release=release.number, exports=release.exports)


def _judged(run: JudgedRun, state: Literal["published", "gate failed"], text: str) -> Row:
    return Row(
        model=run.model,
        recipe=run.recipe_name,
        state=state,
        request_id=run.request_id,
        run_id=run.run_id,
        source_bytes=run.source_bytes,
        stored_bytes=run.stored_bytes,
        quality=run.quality,
        gate=run.gate,
        text=text,
    )


def _unpublished_requests(
    versions: Mapping[str, Version], released: Sequence[Row]
) -> Sequence[str]:
    """Keys of each model's and recipe's latest request, unless a later one is published.

    "Latest" is by the store's clock, which is good enough to show; nothing is decided by it.
    """
    published = {
        f"{row.model}-{row.recipe}": versions[key].modified
        for row in released
        if row.request_id is not None and (key := request_key(row.request_id)) in versions
    }
    latest: dict[str, tuple[float, str]] = {}
    for key, version in versions.items():
        match = _REQUEST_ID.fullmatch(key.removeprefix(REQUESTS_PREFIX).removesuffix(".json"))
        if match and version.modified > published.get(match["name"], 0.0):
            found = (version.modified, key)
            latest[match["name"]] = max(latest.get(match["name"], found), found)
    return [key for _, key in sorted(latest.values(), key=lambda found: found[1])]


def _unreleased(
    root: ObjectStore, key: str, names: Container[tuple[str, str]] | None
) -> Row | None:
    """The row of a request; None where it cannot be read, or is for none of the names."""
    try:
        request = Request.read(root, key)
    except PipelineError:
        return None
    if names is not None and (request.model, request.recipe_name) not in names:
        return None
    verdict = find_verdict(root, request.request_id)
    if verdict is not None and not verdict.passed:
        return _judged(verdict, "gate failed", "; ".join(verdict.failures))
    row = Row(
        model=request.model,
        recipe=request.recipe_name,
        state="not started",
        request_id=request.request_id,
        run_id=request.run_id,
    )
    try:
        return _with_run_status(row, run_store(root, request.run_id))
    except PipelineError as problem:
        return dataclasses.replace(row, state="damaged", text=str(problem))


def run_row(store: ObjectStore) -> Row:
    """The row of the run at a store's root, under its own name."""
    name = url_name(store.root_url)
    return _with_run_status(Row(model=name, recipe="", state="not started", run_id=name), store)


def _with_run_status(row: Row, store: ObjectStore) -> Row:
    run = run_status(store)
    return dataclasses.replace(
        row,
        state=run.state,
        run=run,
        source_bytes=run.source_bytes,
        stored_bytes=run.stored_bytes,
        text=run.text,
    )


def status_table(rows: Sequence[Row]) -> Table:
    """One line per row, of so many; empty columns are left out, since terminals are narrow."""
    titles = (
        *("model", "recipe", "state", "parts", "left", "heartbeat"),
        *("weights", "quality", "exports", ""),
    )
    lines = [_line(row) for row in rows[:MOST_ROWS]]
    shown = [i for i in range(len(titles)) if any(line[i] not in ("", "–") for line in lines)]
    left_out = len(rows) - len(lines)
    caption = f"and {left_out} more; --json has all" if left_out else None
    table = Table(*(titles[i] for i in shown), caption=caption)
    for line in lines:
        table.add_row(*(Text(line[i]) for i in shown))
    return table


def _line(row: Row) -> tuple[str, ...]:
    run = row.run
    parts = left = heartbeat = "–"
    if run is not None and run.parts is not None:
        each = "" if run.seconds_a_part is None else f", {duration(run.seconds_a_part)} each"
        parts = f"{run.parts_done}/{run.parts}{each}"
    if run is not None and run.seconds_left is not None:
        left = duration(run.seconds_left)
    if run is not None and run.heartbeat_seconds is not None:
        heartbeat = f"{duration(run.heartbeat_seconds)} ago"
    state = row.state if row.release is None else f"{row.state}, release {row.release}"
    weights = "–" if row.stored_bytes is None else size(row.stored_bytes)
    if row.stored_bytes is not None and row.source_bytes is not None:
        weights = f"{size(row.source_bytes)} → {weights}"
    quality = quality_text(row.quality, between="\n")  # a line each
    exports = ", ".join(one.format for one in row.exports)
    shown = weights, quality, exports, row.text
    return row.model, row.recipe, state, parts, left, heartbeat, *shown
