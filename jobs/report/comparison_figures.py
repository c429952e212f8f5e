"""Pictures of several runs side by side: quality against size, and two runs' layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.quantities import size
from jobs.report.figure import AS_GIVEN, NUMBERS, Figure, Spec, figure
from jobs.report.layer_errors import LayerError

_MOST_LABELS = 40


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run: its size, and what it loses; less is better of both."""

    name: str
    recipe: str
    stored_bytes: int
    loss: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both size and loss, by size."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.stored_bytes, one.loss, one.name)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def pareto_figure(points: Sequence[Point], loss: str) -> Figure | None:
    """What each run loses against its size; None for fewer than two.

    Args:
        loss: what it is, in words.
    """
    if len(points) < 2:
        return None
    front = pareto_front(points)

    def value(point: Point) -> Spec:
        return {
            "mib": point.stored_bytes / 2**20,
            "loss": float(f"{point.loss:.5g}"),
            "run": point.name,
            "recipe": point.recipe,
            "size": size(point.stored_bytes),
        }

    scale = {"zero": False, "nice": True, "padding": 24}
    x = {"field": "mib", "type": "quantitative", "title": "MiB stored", "scale": scale}
    y = {"field": "loss", "type": "quantitative", "title": loss, "scale": scale}
    tooltip = [
        {"field": "run"},
        {"field": "recipe"},
        {"field": "size", "title": "stored"},
        {"field": "loss", "title": loss},
    ]
    return figure(
        "pareto",
        "What is lost against what is stored",
        "Lower left is better. The line joins the runs that no other beats in both.",
        height=280,
        encoding={"x": x, "y": y},
        layer=[
            {
                "data": {"values": [value(one) for one in front]},
                "mark": {"type": "line", "color": "#8a929b", "strokeDash": [4, 4]},
            },
            {
                "data": {"values": [value(one) for one in points]},
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 90,
                    "color": "#4c78a8",
                    "opacity": 1,
                },
                "encoding": {"tooltip": tooltip},
            },
            {
                "data": {"values": [value(one) for one in points]},
                "mark": {
                    "type": "text",
                    "dy": -12,
                    "color": "currentColor",
                    "fontWeight": "bold",
                },
                "encoding": {"text": {"field": "run"}},
            },
        ],
    )


def ratio_figure(first: Sequence[LayerError], second: Sequence[LayerError]) -> Figure | None:
    """A heat map of two runs: the second's output error as a multiple of the first's.

    None where they share no calibrated layer of a block.
    """
    before = {(one.block, one.name): one.output_error for one in first}
    shared = [
        (one.block, one.name, one.output_error / base)
        for one in second
        if one.block is not None
        and (base := before.get((one.block, one.name)))
        and one.output_error
    ]
    if not shared:
        return None
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, name, _ in shared))}
    few = len(rows) <= _MOST_LABELS
    return figure(
        "ratio",
        "Error of each layer's output: B beside A",
        "The squared error of B as a multiple of A's, each on its own calibration inputs: blue is "
        "where B loses less, red where it loses more.",
        data={
            "values": [
                {"block": block, "row": rows[name], "layer": name, "ratio": float(f"{ratio:.4g}")}
                for block, name, ratio in shared
            ]
        },
        height=len(rows) * (18 if few else 6),
        mark={"type": "rect"},
        encoding={
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": NUMBERS},
            "y": {
                "field": "layer",
                "type": "nominal",
                "sort": AS_GIVEN,
                "title": None,
                "axis": {"labels": few, "ticks": False},
            },
            "color": {
                "field": "ratio",
                "type": "quantitative",
                "title": "B / A",
                "scale": {
                    "type": "log",
                    "scheme": "redblue",
                    "reverse": True,
                    "domain": _around_one([ratio for _, _, ratio in shared]),
                },
                "legend": {"orient": "top", "format": ".2~g", "gradientLength": 150},
            },
            "tooltip": [
                {"field": "layer"},
                {"field": "block"},
                {"field": "ratio", "title": "B / A", "format": ".3g"},
            ],
        },
    )


def _around_one(ratios: Sequence[float]) -> list[float]:
    """Bounds that put 1 in the middle of a logarithmic scale."""
    most = max(1.1, *(max(ratio, 1 / ratio) for ratio in ratios))
    return [1 / most, most]
