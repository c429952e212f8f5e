"""A finished run's report: one HTML page that says what was done, how well, and how long it took.

It follows from what is stored, so no digest covers it, and it is written anew whenever more is
known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from jobs.logging import print_result, status
from jobs.quantities import duration, size
from jobs.reachable import absolute, reachable
from jobs.release.contents import Contents, FinishedRun, artifact_contents, read_run
from jobs.release.loading import Place, load_commands
from jobs.release.markdown import yaml_text
from jobs.release.model_card import facts_of, left_in_float, published_recipe
from jobs.release.quality import measured_on, quality_rows
from jobs.report.code_figures import logged_histograms, worst_codes
from jobs.report.comparison import comparison
from jobs.report.figures import error_figures, sizes_figure
from jobs.report.layer_errors import errors_of, read_records, remarks, worst
from jobs.report.page import page
from jobs.report.time_figures import stages_figure, workers_figure
from jobs.report.timeline import Timeline, read_logs, timeline
from jobs.report.worst_texts import LEVELS, WorstText, worst_text
from pipeline.errors import PipelineError
from pipeline.run.evaluations import Evaluation
from pipeline.run.records import ARTIFACT_PREFIX, PartRecord
from pipeline.run.worst_windows import find_worst_windows
from pipeline.storage.object_store import ObjectStore, open_store

REPORT_KEY = "report.html"
_NUM_WORST = 20


def update_report(store: ObjectStore) -> None:
    """Write the report of the finished run at a store's root."""
    with status("writing the report"):
        store.put(REPORT_KEY, run_report(read_run(store, store.root_url)))


def report_place(store: ObjectStore) -> str:
    """Where the report of the run at a store's root is, as a path or a URL."""
    return store.url(REPORT_KEY).removeprefix("file://")


def report_run(run_url: str, to_url: str | None, *, as_json: bool) -> None:
    """Write the report of a finished run, and say where it is.

    Args:
        to_url: file or URL of the page; None for the run's own.

    Raises:
        DamagedObjectError: the run is not finished, or a record is damaged.
    """
    store = reachable(absolute(run_url))
    with status("writing the report"):
        content = run_report(read_run(store, run_url))
        target, key = (store, REPORT_KEY) if to_url is None else page_file(to_url)
        target.put(key, content)
    _print_place(target.url(key), content, as_json=as_json)


def compare_runs(run_urls: Sequence[str], to_url: str | None, *, as_json: bool) -> None:
    """Write the page of several finished runs side by side, and say where it is.

    Raises:
        PipelineError: no file to write to, or the same run twice.
        DamagedObjectError: a run is not finished, or a record is damaged.
    """
    if to_url is None:
        raise PipelineError(
            f"{len(run_urls)} runs are compared on a page that is none of theirs; say where it is "
            "to be with --to FILE.html"
        )
    if repeated := [url for url, count in Counter(map(absolute, run_urls)).items() if count > 1]:
        raise PipelineError(f"{repeated[0]}: given more than once; compare it with other runs")
    target, key = page_file(to_url)
    with status("comparing the runs"):
        content = comparison({url: reachable(absolute(url)) for url in run_urls})
        target.put(key, content)
    _print_place(target.url(key), content, as_json=as_json)


def _print_place(url: str, content: bytes, *, as_json: bool) -> None:
    place = url.removeprefix("file://")
    told = {"url": place, "size_bytes": len(content)}
    print_result(told, Text(f"report: {place}"), as_json=as_json)


def page_file(url: str) -> tuple[ObjectStore, str]:
    """The store and the key of a page that a user names by --to.

    Raises:
        PipelineError: the name is not that of a page.
    """
    folder, _, name = absolute(url).rpartition("/")
    if not name.endswith(".html"):
        raise PipelineError(f"--to {url}: a page is one file; give it a name that ends in .html")
    return open_store(folder), name


def run_report(run: FinishedRun) -> bytes:
    """The page of a finished run.

    Raises:
        DamagedObjectError: a record is damaged.
    """
    contents = artifact_contents(run)
    records = read_records(run)
    layers = errors_of(run, records)
    logs = read_logs(run.store)
    times = timeline(logs)
    histograms = logged_histograms(logs)
    codes = worst_codes(layers, histograms)
    names = [part.name for part in run.plan.parts] if run.plan is not None else []
    figures = [
        sizes_figure(_sizes(run, contents, records)),
        *error_figures(layers),
        stages_figure(times, names),
        workers_figure(times, names),
    ]
    return page(
        "run_report.html.jinja",
        [
            *(one for one in figures if one is not None),
            *(drawn for one in codes for drawn in (one.codes, one.scales)),
        ],
        run=run,
        headline=_headline(run, contents, times),
        evaluations=[
            (one, quality_rows(one), measured_on(one), _worst_texts(run, one))
            for one in run.evaluations
        ],
        levels=LEVELS,
        worst=worst(layers, _NUM_WORST),
        remarks=remarks(layers),
        num_layers=len(layers),
        codes=codes,
        num_with_codes=sum(one.path in histograms for one in layers),
        in_float=list(left_in_float(run)),
        notes=run.plan.notes if run.plan is not None else (),
        recipe=yaml_text(published_recipe(run)),
        facts=facts_of(contents),
        commands=load_commands(contents, Place(folder=ARTIFACT_PREFIX.rstrip("/"))),
        license=run.origin.license,
        timeline=times,
        stages=times.shares,
    )


def _worst_texts(run: FinishedRun, evaluation: Evaluation) -> list[WorstText]:
    found = find_worst_windows(run.store, evaluation)
    return [] if found is None else [worst_text(one) for one in found.windows]


def _sizes(
    run: FinishedRun, contents: Contents, records: list[PartRecord]
) -> list[tuple[str, str, int]]:
    if run.plan is None:
        return [
            ("source", "weights", run.source_bytes),
            ("stored", "weights", contents.stored_bytes),
        ]
    outside = "outside the blocks"
    rows = [
        ("source", "blocks", sum(part.source_bytes for part in run.plan.parts[1:])),
        ("source", outside, run.plan.parts[0].source_bytes),
    ]
    for place, attribute in (("stored", "size_bytes"), ("in memory", "loaded_bytes")):
        found: dict[bool, int] = {True: 0, False: 0}
        for record in records:
            found[record.part > 0] += getattr(record, attribute)
        rows += [(place, "blocks", found[True]), (place, outside, found[False])]
    return rows


def _headline(run: FinishedRun, contents: Contents, timeline: Timeline) -> list[tuple[str, str]]:
    """The few figures that most readers came for: pairs of a label and a value."""
    stored = contents.stored_bytes
    rows = [
        ("weights", f"{size(run.source_bytes)} → {size(stored)}"),
        ("smaller by a factor of", f"{run.source_bytes / stored:.1f}" if stored else "–"),
    ]
    figures = run.evaluations[0].figures if run.evaluations else {}
    rows += _quality(figures)
    if timeline.sittings:
        rows.append(("from start to end", duration(max(one.end for one in timeline.sittings))))
    return rows


def _quality(figures: dict[str, Any]) -> list[tuple[str, str]]:
    before, after = figures.get("source_perplexity"), figures.get("result_perplexity")
    rows = []
    if before and after:
        rows.append(("perplexity", f"{before:.4g} → {after:.4g}"))
    if figures.get("divergence") is not None:
        rows.append(("KL divergence, nats a token", f"{figures['divergence']:.4f}"))
    if figures.get("cosine") is not None:
        rows.append(("mean cosine", f"{figures['cosine']:.5f}"))
    return rows
