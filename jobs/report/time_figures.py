"""Pictures of where a run's time went: stages by part, and who worked when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.report.figure import NUMBERS, Figure, Spec, figure
from jobs.report.timeline import Mark, Timeline
from pipeline.executor.protocol import group_of
from pipeline.executor.work_spans import coarse
from pipeline.run.worker_api import WorkerApi

_MOST_WORKERS = 40
_MOST_SPANS = 3000
"""A reader's screen has fewer pixels for them."""

_BESIDE = frozenset(
    name
    for name, method in vars(WorkerApi).items()
    if not name.startswith("_") and group_of(method) is not None
)
"""Stages that wait for storage, beside others that compute."""

_COLORS = {
    "restore": "#ffbf79",
    "capture": "#f58518",
    "propagate": "#eeca3b",
    "merge": "#83bcb6",
    "send": "#439894",
    "solve": "#4c78a8",
    "solve_slices": "#9ecae9",
    "join": "#2f4b7c",
    "windows": "#d6a5c9",
    "tune": "#b279a2",
    "quantize_alone": "#54a24b",
    "read": "#88d27a",
    "commit": "#b79a20",
    "commit_sums": "#7d6a14",
    "settle": "#bab0ac",
    "keep": "#9d755d",
    "finalize": "#79706e",
    "evaluate": "#ff9d98",
    "other": "#d8b5a5",
}
"""Of the stages, in the order in which a worker comes to them; what is not here is "other"."""

_LOOKS: dict[Mark, tuple[str, str]] = {
    "committed": ("#8a929b", "triangle-up"),
    "resumed": ("#3f8fd9", "triangle-right"),
    "worker lost": ("#e0443a", "cross"),
    "fewer workers": ("#e08a1e", "triangle-down"),
    "damage found": ("#c95fc0", "diamond"),
    "stopped": ("#e0443a", "square"),
    "finished": ("#2f9e5f", "circle"),
}


def _unit(seconds: float) -> tuple[str, float]:
    """What a time of this length is best told in, and seconds of one."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _stage_color(stages: Iterable[str]) -> Spec:
    """The same colour for a stage in all pictures. All words are ours: see `AS_GIVEN`."""
    found = set(stages)
    shown = {_words(stage): color for stage, color in _COLORS.items() if _words(stage) in found}
    return {
        "field": "stage",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(shown), "range": list(shown.values())},
        "legend": {"orient": "bottom", "columns": 6},
    }


def _words(stage: str) -> str:
    return stage.replace("_", " ") if stage in _COLORS else "other"


def stages_figure(timeline: Timeline, names: Sequence[str]) -> Figure | None:
    """Time of work by stage for each part; None where no driver told of any.

    Args:
        names: of the parts.
    """
    longest = max((sum(by_stage.values()) for by_stage in timeline.seconds.values()), default=0.0)
    unit, divisor = _unit(longest)
    values: list[Spec] = [
        {
            "part": part,
            "name": _name(names, part),
            "stage": _words(stage),
            "time": _short(spent / divisor),
        }
        for part, by_stage in sorted((p, s) for p, s in timeline.seconds.items() if p is not None)
        for stage, spent in by_stage.items()
        if spent
    ]
    if not values:
        return None
    num_parts = max(len(names), 1 + max(part for part in timeline.seconds if part is not None))
    return figure(
        "stages",
        "Work on each part",
        "All workers together. Part 0 is everything outside the blocks; the first block also "
        "compiles its programs.",
        data={"values": values},
        height=220,
        mark={"type": "bar"},
        encoding={
            "x": {
                "field": "part",
                "type": "ordinal",
                "title": "part",
                "axis": NUMBERS,
                "scale": {"domain": list(range(num_parts))},
            },
            "y": {"field": "time", "type": "quantitative", "title": f"{unit} of work"},
            "color": _stage_color(one["stage"] for one in values),
            "tooltip": [
                {"field": "name", "title": "part"},
                {"field": "stage"},
                {"field": "time", "title": unit, "format": ".2f"},
            ],
        },
    )


def workers_figure(timeline: Timeline, names: Sequence[str]) -> Figure | None:
    """A Gantt chart: a row for each driver with what it told of, and below it one for each worker.

    None where no driver tells more than the picture of stages does.
    """
    moments = [one for sitting in timeline.sittings for one in sitting.moments]
    eventful = any(one.mark not in ("committed", "finished") for one in moments)
    worked = any(sitting.work for sitting in timeline.sittings)
    if not worked and not eventful and len(timeline.sittings) < 2:
        return None
    unit, divisor = _unit(max(one.end - one.start for one in timeline.sittings))
    several = len(timeline.sittings) > 1
    labels: list[str] = []
    bars: list[Spec] = []
    marks: list[Spec] = []
    spans: list[Spec] = []
    hidden = 0
    for sitting in timeline.sittings:
        driver = f"driver {sitting.number}" if several else "driver"
        at = len(labels)
        labels.append(driver)
        bars.append(
            {
                "row": at,
                "start": 0,
                "end": _short((sitting.end - sitting.start) / divisor),
                "ending": "ended in order" if sitting.finished else "stopped",
                "parts": sitting.parts,
                "workers": sitting.workers,
            }
        )
        marks += (
            {
                "row": at,
                "start": _short(one.seconds / divisor),
                "what": one.mark,
                "part": None if one.part is None else _name(names, one.part),
                "text": one.text,
            }
            for one in sitting.moments
        )
        workers = sorted({span.worker for span in sitting.work})
        shown = workers[: max(0, _MOST_WORKERS - len(labels))]
        hidden += len(workers) - len(shown)
        places = {worker: len(labels) + i for i, worker in enumerate(shown)}
        labels += (f"worker {w}" for w in shown)
        work = [span for span in sitting.work if span.worker in places]
        spans += (
            {
                "row": places[span.worker],
                "stage": _words(span.stage),
                "start": _short(span.start / divisor),
                "end": _short(span.end / divisor),
                "beside": span.stage in _BESIDE,
            }
            for span in coarse(work, _MOST_SPANS // len(timeline.sittings))
        )
    return _gantt(labels, bars, marks, spans, unit, hidden=hidden, several=several)


def _gantt(
    labels: Sequence[str],
    bars: Sequence[Spec],
    marks: Sequence[Spec],
    spans: Sequence[Spec],
    unit: str,
    *,
    hidden: int,
    several: bool,
) -> Figure:
    x: Spec = {"field": "start", "type": "quantitative", "title": f"{unit} since the driver began"}
    y: Spec = {
        "field": "row",
        "type": "ordinal",
        "title": None,
        "scale": {"domain": list(range(len(labels)))},
        # Our own words alone: an expression is code.
        "axis": {"labelExpr": f"{list(labels)}[datum.value]", "ticks": False},
    }
    between = [{"field": "start", "format": ".2f"}, {"field": "end", "format": ".2f"}]
    found = {one["what"] for one in marks}
    looks = {mark: look for mark, look in _LOOKS.items() if mark in found}
    layers: list[Spec] = [
        {
            "data": {"values": list(bars)},
            "mark": {"type": "bar", "height": 2, "color": "#8a929b"},
            "encoding": {
                "x2": {"field": "end"},
                "tooltip": [
                    {"field": "ending"},
                    {"field": "parts", "title": "parts committed"},
                    {"field": "workers"},
                ],
            },
        },
    ]
    for beside in (False, True):
        mark = {"height": 3, "yOffset": 6} if beside else {"height": 8}
        drawn = [one for one in spans if one["beside"] is beside]
        if drawn:
            layers.append(
                {
                    "data": {"values": drawn},
                    "mark": {"type": "bar", **mark},
                    "encoding": {
                        "x2": {"field": "end"},
                        "color": _stage_color(one["stage"] for one in spans),
                        "tooltip": [{"field": "stage"}, *between],
                    },
                }
            )
    layers.append(
        {
            "data": {"values": list(marks)},
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1, "strokeWidth": 2},
            "encoding": {
                "fill": {
                    "field": "what",
                    "type": "nominal",
                    "title": None,
                    "scale": {
                        "domain": list(looks),
                        "range": [color for color, _ in looks.values()],
                    },
                    "legend": {"orient": "bottom"},
                },
                "shape": {
                    "field": "what",
                    "type": "nominal",
                    "title": None,
                    "scale": {
                        "domain": list(looks),
                        "range": [shape for _, shape in looks.values()],
                    },
                    "legend": {"orient": "bottom"},
                },
                "tooltip": [
                    {"field": "what"},
                    {"field": "part"},
                    {"field": "text"},
                    {"field": "start", "title": unit, "format": ".2f"},
                ],
            },
        }
    )
    caption = (
        "Thick bars are what a worker computes; thin ones below them are what it reads and commits "
        "meanwhile. Empty stretches are waiting."
    )
    if several:
        caption += (
            " Each driver begins at 0: where one stopped, the next resumed from what was committed."
        )
    if hidden:
        caption += f" {hidden} more workers are not shown."
    return figure(
        "workers",
        "Who worked when",
        caption,
        height=20 * len(labels),
        encoding={"x": x, "y": y},
        layer=layers,
    )


def _name(names: Sequence[str], part: int) -> str:
    return names[part] if 0 <= part < len(names) else str(part)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
