"""Where a catalog's runs and releases stand, from storage alone.

How runs and releases stand, as a person reads it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.catalog.catalog_file import Catalog
from jobs.catalog.request import REQUESTS_PREFIX, Request, request_key, run_store
from jobs.fleet.nightly import quality_text
from jobs.fleet.run_state import RunState, run_state
from jobs.publish.releases import Current, find_current, published_pairs
from jobs.publish.verdict import find_verdict
from jobs.quantities import size
from pipeline.errors import PipelineError
from pipeline.storage.backend import Version
from pipeline.storage.object_store import ObjectStore

_AT_ONCE = 16
_ID = re.compile(r"(?P<pair>.+)-[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One release, or one run that is none, or not yet.

    Attributes:
        state: "published", "gate failed", or what `RunState` says.
        release: the current one's number.
        run: None where nothing is known of it but what the release says.
        quality: see `jobs.publish.verdict.figures`.
        text: why the gate was not passed, or what is wrong.
    """

    model: str
    recipe: str
    state: str
    request_id: str | None = None
    run_id: str | None = None
    release: int | None = None
    run: RunState | None = None
    source_bytes: int | None = None
    stored_bytes: int | None = None
    quality: dict[str, Any] | None = None
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def status(root: ObjectStore, catalog: Catalog | None = None) -> tuple[Row, ...]:
    """Every current release below a root, and every run that was asked for after it.

    Args:
        catalog: only its models, and a row for those of which there is nothing yet.
    """
    names = None if catalog is None else _pairs_of(catalog)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pairs = [pair for pair in published_pairs(root) if names is None or pair in names]
        currents = dict(zip(pairs, pool.map(lambda pair: _current(root, pair), pairs), strict=True))
        asked = root.versions(REQUESTS_PREFIX)
        requests = pool.map(lambda key: _request(root, key), _later(asked, currents))
        rows = [*map(_released, currents.items())]
        wanted = [
            request
            for request in requests
            if request is not None
            and (names is None or (request.model, request.recipe_name) in names)
        ]
        rows += pool.map(lambda request: _unreleased(root, request), wanted)
    there = {(row.model, row.recipe) for row in rows}
    rows += [
        Row(model=model, recipe=recipe, state="not started")
        for model, recipe in names or ()
        if (model, recipe) not in there
    ]
    return tuple(sorted(rows, key=lambda row: (row.model, row.recipe, row.state != "published")))


def _pairs_of(catalog: Catalog) -> dict[tuple[str, str], None]:
    return {
        (name, recipe.name): None
        for entry in catalog.entries
        for name in (entry.name, *entry.aliases)
        for recipe in entry.recipes
    }


def _current(root: ObjectStore, pair: tuple[str, str]) -> Current | str:
    try:
        found = find_current(root, *pair)
    except PipelineError as problem:
        return str(problem)
    return "it was there a moment ago" if found is None else found


def _released(item: tuple[tuple[str, str], Current | str]) -> Row:
    (model, recipe), current = item
    if isinstance(current, str):
        return Row(model=model, recipe=recipe, state="damaged", text=current)
    release = current.release
    return Row(
        model=model,
        recipe=recipe,
        state="published",
        request_id=release.request_id,
        run_id=release.run_id,
        release=release.number,
        source_bytes=release.source_bytes,
        stored_bytes=release.stored_bytes,
        quality=release.quality,
        text=f"set aside: {', '.join(current.set_aside)}" if current.set_aside else "",
    )


def _later(
    asked: Mapping[str, Version], currents: Mapping[tuple[str, str], Current | str]
) -> Sequence[str]:
    """Of each model and recipe, the latest request, if it is later than the one that is published.

    Told by the store's clock, since nothing is decided by it.
    """
    published = {
        f"{model}-{recipe}": asked[key].modified
        for (model, recipe), current in currents.items()
        if isinstance(current, Current)
        and (key := request_key(current.release.request_id)) in asked
    }
    latest: dict[str, tuple[float, str]] = {}
    for key, version in asked.items():
        match = _ID.fullmatch(key.removeprefix(REQUESTS_PREFIX).removesuffix(".json"))
        if match and version.modified > published.get(match["pair"], 0.0):
            latest[match["pair"]] = max(
                latest.get(match["pair"], (0.0, "")), (version.modified, key)
            )
    return [key for _, key in sorted(latest.values(), key=lambda found: found[1])]


def _request(root: ObjectStore, key: str) -> Request | None:
    try:
        return Request.read(root, key)
    except PipelineError:
        return None


def _unreleased(root: ObjectStore, request: Request) -> Row:
    row = Row(
        model=request.model,
        recipe=request.recipe_name,
        state="not started",
        request_id=request.request_id,
        run_id=request.run_id,
    )
    verdict = find_verdict(root, request.request_id)
    if verdict is not None and not verdict.passed:
        return dataclasses.replace(
            row,
            state="gate failed",
            source_bytes=verdict.source_bytes,
            stored_bytes=verdict.stored_bytes,
            quality=verdict.quality,
            text="; ".join(verdict.failures),
        )
    try:
        found = run_state(run_store(root, request.run_id))
    except PipelineError as problem:
        return dataclasses.replace(row, state="damaged", text=str(problem))
    return dataclasses.replace(
        row,
        state=found.state,
        run=found,
        source_bytes=found.source_bytes,
        stored_bytes=found.stored_bytes,
        text=found.text,
    )


def status_table(rows: Sequence[Row]) -> Table:
    """A line for each; columns that would be empty are left out, for terminals are narrow."""
    titles = ("model", "recipe", "state", "parts", "left", "heartbeat", "weights", "quality", "")
    lines = [_line(row) for row in rows]
    shown = [i for i in range(len(titles)) if any(line[i] not in ("", "–") for line in lines)]
    table = Table(*(titles[i] for i in shown))
    for line in lines:
        table.add_row(*(Text(line[i]) for i in shown))
    return table


def _line(row: Row) -> tuple[str, ...]:
    run = row.run
    parts = left = heartbeat = "–"
    if run is not None and run.parts is not None:
        parts = f"{run.parts_done}/{run.parts}"
        if run.seconds_a_part is not None:
            parts += f", {duration(run.seconds_a_part)} each"
    if run is not None and run.seconds_left is not None:
        left = duration(run.seconds_left)
    if run is not None and run.heartbeat_seconds is not None:
        heartbeat = f"{duration(run.heartbeat_seconds)} ago"
    state = row.state if row.release is None else f"{row.state}, release {row.release}"
    return (
        row.model,
        row.recipe,
        state,
        parts,
        left,
        heartbeat,
        _weights(row),
        quality_text(row.quality),
        row.text,
    )


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _weights(row: Row) -> str:
    if row.stored_bytes is None:
        return "–"
    before = "" if row.source_bytes is None else f"{size(row.source_bytes)} → "
    return f"{before}{size(row.stored_bytes)}"
