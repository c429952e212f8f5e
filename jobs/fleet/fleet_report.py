"""A fleet's page: how every model × recipe below a catalog's root stands, from storage alone.

ROOT/report/index.html   written by `nightly`; links lead to the reports of runs beside it

The same storage gives the same page: the reader's browser works out how long ago things were.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shlex
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from rich.text import Text

from jobs.catalog.catalog_file import Catalog, read_catalog
from jobs.catalog.entries import Gate
from jobs.catalog.request import REQUESTS_PREFIX, RUNS_PREFIX, is_id, request_key, run_prefix
from jobs.fleet.nights import FAILED, MOST_NIGHTS, Night, NightEntry, latest, read_nights
from jobs.fleet.status import Row, catalog_names, status
from jobs.logging import print_result, waiting
from jobs.publish.closeness import Closeness, closest
from jobs.publish.releases import MODELS_PREFIX
from jobs.publish.verdict import quality_text
from jobs.quantities import duration, size
from jobs.reachable import absolute, reachable
from jobs.report.figure import Figure, figure
from jobs.report.page import page
from jobs.report.run_report import REPORT_KEY, page_file
from pipeline.errors import PipelineError
from pipeline.fidelity import Fidelity
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore

FLEET_PAGE_KEY = "report/index.html"
_TO_ROOT = "../"
_NUM_THREADS = 16
_FOLDERS_TOGETHER = 64
"""Of runs, listed by one thread."""
_FEWEST_DAYS = 20
"""That the picture of nights spans."""
_COLOURS = {
    "published": "#4c78a8",
    "gate failed": "#f58518",
    "failed": "#e45756",
    "elsewhere": "#72b7b2",
    "set aside": "#9d9da1",
}
_INTERRUPTED = ("stopped", "silent")
_BROKEN_STATES = ("damaged", "gate failed", *_INTERRUPTED)


@dataclass(frozen=True, kw_only=True)
class EntryLine:
    """One entry of the page.

    Attributes:
        report: where its run's report lies, from the page; "" if there is none.
        quality: in words.
        closeness: to the limit that it is closest to.
        since: when its release was published, by the store's clock.
        decided, decision: the latest night that had to do with it, and what that made.
        mend: the command that mends what is wrong; "" where nothing is.
    """

    row: Row
    report: str = ""
    quality: str = ""
    closeness: Closeness | None = None
    since: datetime.datetime | None = None
    decided: Night | None = None
    decision: NightEntry | None = None
    mend: str = ""

    @property
    def state(self) -> str:
        """In words, with how far it is."""
        run, row = self.row.run, self.row
        if row.release is not None:
            return f"{row.state}, release {row.release}"
        if run is not None and run.parts is not None and row.state != "finished":
            return f"{row.state}, {run.parts_done} of {run.parts} parts"
        return row.state

    @property
    def trouble(self) -> str:
        """What is wrong, in words."""
        if self.decision is not None and self.decision.result in FAILED:
            return self.decision.text or "; ".join(self.decision.reasons)
        return self.row.text

    @property
    def advice(self) -> str:
        """What to do before the command that mends it."""
        if "gate failed" in (self.row.state, self.decision and self.decision.result):
            return "Choose a finer recipe, or a wider limit, in the catalog; then"
        if self.row.state in _INTERRUPTED:
            return "Go on from its last committed block:"
        return "Mend what it names; then"

    @property
    def used(self) -> str:
        """How much of what the gate allows is used up, in words."""
        if self.closeness is None:
            return ""
        used = self.closeness.used
        share = f"{used:.0%}" if used < 100 else "far more"
        return f"{share}, {self.closeness.figure}"


def find_fleet(what: str) -> tuple[ObjectStore, Catalog | None] | None:
    """The root that a catalog's file names, or that lies at a URL; None where no fleet is.

    Raises:
        PipelineError: a catalog that cannot be read.
    """
    if what.endswith((".yaml", ".yml")):
        catalog = read_catalog(what)
        return reachable(catalog.root_url), catalog
    store = reachable(absolute(what))
    is_root = any(True for prefix in (MODELS_PREFIX, REQUESTS_PREFIX) for _ in store.stream(prefix))
    return None if store.exists(MANIFEST_KEY) or not is_root else (store, None)


def update_fleet_report(root: ObjectStore, catalog: Catalog | None = None) -> None:
    """Write the page of the fleet at a root."""
    with waiting("writing the fleet's page"):
        root.put(FLEET_PAGE_KEY, fleet_report(root, catalog, to_root=_TO_ROOT))


def report_fleet(
    root: ObjectStore, catalog: Catalog | None, to_url: str | None, *, as_json: bool
) -> None:
    """Write the page of the fleet at a root, and say where it is.

    Args:
        to_url: file or URL of the page; None for the fleet's own.
    """
    with waiting("writing the fleet's page"):
        if to_url is None:
            target, key, to_root = root, FLEET_PAGE_KEY, _TO_ROOT
        else:
            target, key = page_file(to_url)
            to_root = f"{root.root_url}/"
        content = fleet_report(root, catalog, to_root=to_root)
        target.put(key, content)
    url = target.url(key).removeprefix("file://")
    print_result({"url": url, "size_bytes": len(content)}, Text(f"report: {url}"), as_json=as_json)


def fleet_report(root: ObjectStore, catalog: Catalog | None = None, *, to_root: str) -> bytes:
    """The page of the fleet at a root.

    Args:
        catalog: whose entries are shown even if nothing of them is in storage yet.
        to_root: from the page to the root, ending in a slash.
    """
    nights, num_damaged = read_nights(root, MOST_NIGHTS)
    lines = _lines(root, catalog, nights, to_root)
    return fleet_page(root.root_url, lines, nights, num_damaged)


def fleet_page(
    root_url: str, lines: Sequence[EntryLine], nights: Sequence[Night], num_damaged: int
) -> bytes:
    """The page of these entries and nights."""
    # One day is no trend.
    figures = [_nights_figure(nights)] if len({one.began_at.date() for one in nights}) > 1 else []
    return page(
        "fleet_report.html.jinja",
        figures,
        scripts=("table.js",),
        root_url=root_url.removeprefix("file://"),
        headline=_headline(lines),
        lines=lines,
        states=sorted({line.row.state for line in lines}),
        broken=[line for line in lines if line.mend],
        last=nights[-1] if nights else None,
        last_counts=Counter(entry.result for entry in nights[-1].entries) if nights else {},
        num_damaged=num_damaged,
        duration=duration,
        size=size,
        is_finite=math.isfinite,
    )


def _lines(
    root: ObjectStore, catalog: Catalog | None, nights: Sequence[Night], to_root: str
) -> list[EntryLine]:
    decided = latest(nights)
    rows = list(status(root))
    known = {(row.model, row.recipe) for row in rows}
    # An entry whose source is away was never requested. What its catalog no longer names is gone.
    wanted = decided if catalog is None else catalog_names(catalog)
    missing = dict.fromkeys(names for names in wanted if names not in known)
    rows += [Row(model=model, recipe=recipe, state="not started") for model, recipe in missing]
    rows.sort(key=lambda row: (row.model, row.recipe, row.state != "published"))
    published = {key: one.modified for key, one in root.versions(MODELS_PREFIX).items()}
    reports = _reports(root, rows) if _is_linked(to_root) else frozenset()
    found = []
    for row in rows:
        line = _line(row, published, reports, to_root)
        night, entry = decided.get((row.model, row.recipe), (None, None))
        line = dataclasses.replace(line, decided=night, decision=entry)
        found.append(dataclasses.replace(line, mend=_mend(root, line)))
    return found


def _is_linked(to_root: str) -> bool:
    """Whether a browser can follow links from the page to what is below the root."""
    return to_root == _TO_ROOT or to_root.startswith("file://")


def _reports(root: ObjectStore, rows: Sequence[Row]) -> frozenset[str]:
    """The keys of the reports that the rows' runs have; other runs are not looked at."""
    ids = sorted({row.run_id for row in rows if row.run_id is not None and is_id(row.run_id)})
    groups = [ids[i : i + _FOLDERS_TOGETHER] for i in range(0, len(ids), _FOLDERS_TOGETHER)]

    def of(group: Sequence[str]) -> list[str]:
        found = root.folders(map(run_prefix, group))
        return [f"{prefix}{REPORT_KEY}" for prefix, files in found if REPORT_KEY in files]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return frozenset(key for keys in pool.map(of, groups) for key in keys)


def _line(
    row: Row, published: Mapping[str, float], reports: Container[str], to_root: str
) -> EntryLine:
    report = f"{RUNS_PREFIX}{row.run_id}/{REPORT_KEY}"
    release = f"{MODELS_PREFIX}{row.model}/{row.recipe}/history/{row.release or 0:06d}.json"
    since = published.get(release)
    return EntryLine(
        row=row,
        report=to_root + quote(report) if report in reports else "",
        quality=quality_text(row.quality),
        closeness=_closeness(row),
        since=None if since is None else datetime.datetime.fromtimestamp(since, datetime.UTC),
    )


def _closeness(row: Row) -> Closeness | None:
    if row.gate is None or row.quality is None:
        return None
    try:
        return closest(Gate.model_validate(row.gate), Fidelity.from_figures(row.quality))
    except (TypeError, ValueError):  # a later version's limits, or figures
        return None


def _mend(root: ObjectStore, line: EntryLine) -> str:
    """The command that mends an entry; "" where nothing is wrong with it."""
    row, night, entry = line.row, line.decided, line.decision
    has_failed = night is not None and entry is not None and entry.result in FAILED
    if has_failed and night is not None and line.since is not None:
        has_failed = line.since < night.began_at  # or else it was mended since
    if not has_failed and row.state not in _BROKEN_STATES:
        return ""
    if row.request_id is not None and row.state in _INTERRUPTED:
        try:
            return shlex.join(["quantfleet", "fulfil", root.url(request_key(row.request_id))])
        except PipelineError:  # what is stored there is no id
            pass
    catalog = "CATALOG" if night is None else night.catalog
    return shlex.join(["quantfleet", "nightly", catalog, "--only", row.model])


def _headline(lines: Sequence[EntryLine]) -> list[tuple[str, str]]:
    """The few figures that most readers came for: pairs of a label and a value."""
    rows = [line.row for line in lines]
    published = [row for row in rows if row.state == "published"]
    before = sum(row.source_bytes or 0 for row in published)
    after = sum(row.stored_bytes or 0 for row in published)
    found = [
        ("published", f"{len(published)} of {len(rows)}"),
        ("need a hand", str(sum(1 for line in lines if line.mend))),
        ("running", str(sum(1 for row in rows if row.state in ("planning", "running")))),
    ]
    if before:
        found.append(("weights published", f"{size(before)} → {size(after)}"))
    return found


def _nights_figure(nights: Sequence[Night]) -> Figure:
    values: list[dict[str, Any]] = [
        {
            "night": night.began,
            "result": result,
            "entries": count,
            "took": duration(night.seconds),
        }
        for night in nights
        for result, count in sorted(Counter(entry.result for entry in night.entries).items())
    ]
    colours = {name: _COLOURS[name] for name in _COLOURS if name in {v["result"] for v in values}}
    # A bar without height, so that few nights are not drawn as wide ones.
    long_before = nights[-1].began_at - datetime.timedelta(days=_FEWEST_DAYS)
    values.append({"night": long_before.isoformat(), "result": values[-1]["result"], "entries": 0})
    return figure(
        "nights",
        "What nights made",
        "Entries that were not up to date, by what became of them. A night on which there was "
        "nothing to do has no bar.",
        data={"values": values},
        height=160,
        mark={"type": "bar", "cornerRadius": 2},
        encoding={
            "x": {
                "field": "night",
                "type": "temporal",
                "timeUnit": "utcyearmonthdate",
                "title": None,
            },
            "y": {"field": "entries", "type": "quantitative", "title": "entries"},
            "color": {
                "field": "result",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(colours), "range": list(colours.values())},
                "legend": {"orient": "bottom"},
            },
            "tooltip": [
                {"field": "night", "title": "began"},
                {"field": "result", "title": "result"},
                {"field": "entries", "title": "entries"},
                {"field": "took", "title": "the night took"},
            ],
        },
    )
