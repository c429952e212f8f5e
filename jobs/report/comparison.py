"""Several finished runs side by side: sizes, quality, layers and recipes."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.quantities import size
from jobs.release.contents import FinishedRun, artifact_contents, read_run
from jobs.release.markdown import yaml_text
from jobs.release.model_card import published_recipe
from jobs.release.quality import measured_on, quality_rows
from jobs.report.comparison_figures import Point, pareto_figure, ratio_figure
from jobs.report.layer_errors import LayerError, errors_of, read_records
from jobs.report.page import page
from pipeline.canonical import digest_of
from pipeline.run.evaluations import Evaluation
from pipeline.run.worst_windows import find_worst_windows
from pipeline.storage.object_store import ObjectStore

_FIGURES = {
    "divergence": "KL divergence, nats a token",
    "result_perplexity": "perplexity",
    "cosine": "1 - cosine",
}
"""What results are placed by, the first that they have."""


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One of the runs.

    Attributes:
        name: a letter, by which pictures and tables call it.
        url: as the user gave it.
    """

    name: str
    url: str
    run: FinishedRun
    stored_bytes: int
    layers: tuple[LayerError, ...]

    @property
    def label(self) -> str:
        return f"{self.name}: {self.run.recipe.name}"

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        """By the digest of what they were measured on."""
        return {digest_of(one.measured_on): one for one in self.run.evaluations}

    @property
    def recipe(self) -> str:
        return yaml_text(published_recipe(self.run))


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """What a run loses more than the first one, on the same windows.

    Attributes:
        mean: of the differences of the windows' mean losses; below 0 where this run is better.
        standard_error: of that mean; None for one window.
        better: windows on which this run lost less.
    """

    name: str
    text_set: str
    mean: float
    standard_error: float | None
    better: int
    windows: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the mean is further from 0 than two standard errors."""
        return self.standard_error is not None and abs(self.mean) > 2 * self.standard_error


def comparison(stores: Mapping[str, ObjectStore]) -> bytes:
    """The page of several finished runs.

    Args:
        stores: at the runs' roots, by their URLs.

    Raises:
        DamagedObjectError: a run is not finished, or a record is damaged.
    """
    names = string.ascii_uppercase
    runs = [
        _compared(names[i] if i < len(names) else str(i + 1), url, read_run(store, url))
        for i, (url, store) in enumerate(stores.items())
    ]
    shared = _shared_evaluation(runs)
    figures = [pareto_figure(*_points(runs, shared))] if shared is not None else []
    if len(runs) == 2:
        figures.append(ratio_figure(runs[0].layers, runs[1].layers))
    return page(
        "comparison.html.jinja",
        [one for one in figures if one is not None],
        runs=runs,
        sources=sorted({one.run.manifest.provenance.get("source_digest", "") for one in runs}),
        rows=_rows(runs),
        quality=_quality(runs, shared),
        measured=() if shared is None else measured_on(_first(runs, shared)),
        differences=[] if shared is None else paired_differences(runs, shared),
        recipes=_marked([one.recipe for one in runs]),
    )


def _compared(name: str, url: str, run: FinishedRun) -> ComparedRun:
    return ComparedRun(
        name=name,
        url=url,
        run=run,
        stored_bytes=artifact_contents(run).stored_bytes,
        layers=errors_of(run, read_records(run)),
    )


def _shared_evaluation(runs: Sequence[ComparedRun]) -> str | None:
    """The digest of what most runs were measured on; None unless two were."""
    counts = Counter(sorted(digest for one in runs for digest in one.evaluations))
    digest, count = max(counts.items(), key=lambda one: one[1], default=("", 0))
    return digest if count > 1 else None


def _first(runs: Sequence[ComparedRun], digest: str) -> Evaluation:
    return next(one.evaluations[digest] for one in runs if digest in one.evaluations)


def _rows(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """A label, and a value for each run."""
    return [
        ("source", [one.run.origin.name for one in runs]),
        ("weights of the source", [size(one.run.source_bytes) for one in runs]),
        ("stored", [size(one.stored_bytes) for one in runs]),
        (
            "in memory",
            ["–" if (n := one.run.loaded_bytes) is None else size(n) for one in runs],
        ),
        (
            "smaller by a factor of",
            [f"{one.run.source_bytes / one.stored_bytes:.2f}" for one in runs],
        ),
        (
            "layers",
            [", ".join(f"{count} × {x}" for x, count in one.run.schemes.items()) for one in runs],
        ),
        (
            "layers left in float",
            [str(sum(layer.scheme is None for layer in one.run.layers)) for one in runs],
        ),
    ]


def _quality(runs: Sequence[ComparedRun], shared: str | None) -> list[tuple[str, list[str]]]:
    """Each figure of the evaluation that most runs share: of the source, then of each run."""
    if shared is None:
        return []
    by_run = [
        {row.figure: row for row in quality_rows(one.evaluations[shared])}
        if shared in one.evaluations
        else {}
        for one in runs
    ]
    names = dict.fromkeys(name for rows in by_run for name in rows)
    return [
        (
            name,
            [
                next(rows[name].source for rows in by_run if name in rows),
                *(rows[name].result if name in rows else "–" for rows in by_run),
            ],
        )
        for name in names
    ]


def _points(runs: Sequence[ComparedRun], shared: str) -> tuple[list[Point], str]:
    """Where each evaluated run stands, and what by."""
    figures = {
        one.name: one.evaluations[shared].figures for one in runs if shared in one.evaluations
    }
    key = next(
        (k for k in _FIGURES if all(_loss(k, found) is not None for found in figures.values())), ""
    )
    points = [
        Point(name=one.name, recipe=one.run.recipe.name, stored_bytes=one.stored_bytes, loss=loss)
        for one in runs
        if one.name in figures and (loss := _loss(key, figures[one.name])) is not None
    ]
    return points, _FIGURES.get(key, "")


def _loss(key: str, figures: Mapping[str, Any]) -> float | None:
    """Of all texts together, or the mean of the named sets."""
    own = figures.get(key)
    values = [own] if own is not None else [one.get(key) for one in figures.get("sets", ())]
    if not values or any(not isinstance(value, int | float) for value in values):
        return None
    mean = math.fsum(values) / len(values)
    return 1 - mean if key == "cosine" else mean


def paired_differences(runs: Sequence[ComparedRun], shared: str) -> list[PairedDifference]:
    """Of each run beside the first that kept what every window lost."""
    kept = [
        (one.name, found.lost)
        for one in runs
        if shared in one.evaluations
        and (found := find_worst_windows(one.run.store, one.evaluations[shared])) is not None
        and found.lost
    ]
    if not kept:
        return []
    (_, base), *others = kept
    return [
        difference
        for name, lost in others
        for text_set in base
        if (difference := _paired(name, text_set, base[text_set], lost.get(text_set, ())))
    ]


def _paired(
    name: str, text_set: str, base: Sequence[float | None], other: Sequence[float | None]
) -> PairedDifference | None:
    if len(base) != len(other):
        return None
    pairs = zip(base, other, strict=True)
    found = [b - a for a, b in pairs if a is not None and b is not None]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    spread = math.fsum((one - mean) ** 2 for one in found)
    error = math.sqrt(spread / (len(found) - 1) / len(found)) if len(found) > 1 else None
    return PairedDifference(
        name=name,
        text_set=text_set,
        mean=mean,
        standard_error=error,
        better=sum(one < 0 for one in found),
        windows=len(found),
    )


def _marked(recipes: Sequence[str]) -> list[list[tuple[str, bool]]]:
    """Each recipe's lines, and whether another recipe lacks them."""
    lines = [recipe.splitlines() for recipe in recipes]
    common = set(lines[0]).intersection(*lines[1:])
    return [[(line, line not in common) for line in one] for one in lines]
