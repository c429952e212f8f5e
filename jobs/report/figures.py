"""Pictures of what a run made: how large it is, and what each layer lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.quantities import size
from jobs.report.figure import AS_GIVEN, NUMBERS, Figure, Spec, figure
from jobs.report.layer_errors import LayerError

_MOST_LABELS = 40


def sizes_figure(sizes: Sequence[tuple[str, str, int]]) -> Figure:
    """Args: sizes: rows of (where, what, bytes); rows of one place are stacked in their order."""
    places = {place for place, _, _ in sizes}
    values = [
        {"row": i, "place": place, "kind": kind, "mib": num_bytes / 2**20, "size": size(num_bytes)}
        for i, (place, kind, num_bytes) in enumerate(sizes)
    ]
    return figure(
        "sizes",
        "Size of the weights",
        "In the source, as stored, and in memory once stock Keras has loaded them.",
        data={"values": values},
        height=34 * len(places),
        mark={"type": "bar", "cornerRadius": 2},
        encoding={
            "y": {"field": "place", "type": "nominal", "sort": AS_GIVEN, "title": None},
            "x": {"field": "mib", "type": "quantitative", "title": "MiB"},
            "color": {
                "field": "kind",
                "type": "nominal",
                "sort": AS_GIVEN,
                "title": None,
                "scale": {"scheme": "tableau10"},
                "legend": {"orient": "bottom"},
            },
            "tooltip": [
                {"field": "place", "title": "where"},
                {"field": "kind", "title": "what"},
                {"field": "size", "title": "size"},
            ],
        },
    )


def error_figures(layers: Sequence[LayerError]) -> tuple[Figure, ...]:
    """Heat maps of blocks × layers: the output error beside rounding's, and as it is.

    None for layers outside the blocks, or without an error on calibration inputs.
    """
    shown = [one for one in layers if one.block is not None and one.output_error is not None]
    if not shown:
        return ()
    rows = {name: row for row, name in enumerate(dict.fromkeys(one.name for one in shown))}
    share = _error_map(
        [
            {
                "block": one.block,
                "row": rows[one.name],
                "layer": one.name,
                "share": _rounded(one.of_rounding),
                "weights": _rounded(one.weight_error),
                "scheme": one.scheme,
                "damping": one.account.get("damping"),
                "kept": one.account.get("kept"),
            }
            for one in shown
        ],
        [
            {"field": "share", "format": ".1%", "title": "of rounding's error"},
            {"field": "weights", "format": ".1%", "title": "error of the weights"},
            {"field": "scheme"},
            {"field": "damping"},
            {"field": "kept"},
        ],
        name="share",
        title="Error of each layer's output, beside rounding to nearest",
        caption="What is left of the squared error that rounding each weight would make, on the "
        "calibration inputs: less is better, 100% is no better than rounding.",
        color={
            "field": "share",
            "type": "quantitative",
            "title": "of rounding's error",
            "scale": {"scheme": "viridis", "domain": [0, 1], "clamp": True},
            "legend": {"orient": "top", "format": ".0%", "gradientLength": 150},
        },
    )
    error = _error_map(
        [
            {
                "block": one.block,
                "row": rows[one.name],
                "layer": one.name,
                # A colour on a logarithmic scale has no place for zero.
                "error": _rounded(one.output_error) or None,
            }
            for one in shown
        ],
        [{"field": "error", "format": ".3g", "title": "squared error"}],
        name="error",
        title="Error of each layer's output, as it is",
        caption="Twice the mean squared error, summed over the layer's outputs, on a logarithmic "
        "scale. Layers with larger outputs have larger errors; look for a block that stands out.",
        color={
            "field": "error",
            "type": "quantitative",
            "title": "squared error",
            "scale": {"type": "log", "scheme": "viridis"},
            "legend": {"orient": "top", "format": ".0e", "gradientLength": 150},
        },
    )
    return share, error


def _error_map(
    values: list[dict[str, Any]],
    tooltip: list[Spec],
    *,
    name: str,
    title: str,
    caption: str,
    color: Spec,
) -> Figure:
    num_rows = len({one["row"] for one in values})
    few = num_rows <= _MOST_LABELS
    return figure(
        name,
        title,
        caption,
        data={"values": values},
        height=num_rows * (18 if few else 6),
        mark={"type": "rect"},
        encoding={
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": NUMBERS,
            },
            "y": {
                "field": "layer",
                "type": "nominal",
                "sort": AS_GIVEN,
                "title": None,
                "axis": {"labels": few, "ticks": False},
            },
            "color": color,
            "tooltip": [{"field": "layer"}, {"field": "block"}, *tooltip],
        },
    )


def _rounded(value: float | None) -> float | None:
    """As many digits as a reader sees: a page may show many thousands."""
    return None if value is None else float(f"{value:.4g}")
