"""Small multiples of the worst layers: how often each code occurs, and how the scales spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.report.figure import Figure, Spec, figure
from jobs.report.layer_errors import LayerError
from pipeline.run.code_histograms import NUM_SCALE_BINS, SCALE_OCTAVES, CodeHistogram
from pipeline.run.events import Event

_NUM_SHOWN = 6
_HEIGHT = 90
_COLOR = "#4c78a8"


@dataclass(frozen=True, kw_only=True)
class WorstCodes:
    """A layer, and the pictures of its codes and of its scales."""

    layer: LayerError
    histogram: CodeHistogram
    codes: Figure
    scales: Figure

    @property
    def share_at_ends(self) -> tuple[float, float]:
        """Of the weights, how many have the lowest and the highest code."""
        low, high = self.histogram.ends
        return low / self.histogram.num_weights, high / self.histogram.num_weights


def logged_histograms(logs: Iterable[Sequence[Event]]) -> dict[str, CodeHistogram]:
    """What drivers told of their layers, by path, as far as it is well formed; the last counts.

    Args:
        logs: of each driver.
    """
    found: dict[str, CodeHistogram] = {}
    for event in sorted((one for log in logs for one in log), key=lambda one: one.time):
        told = event.values.get("histograms")
        for path, value in told.items() if isinstance(told, dict) else ():
            histogram = CodeHistogram.from_log(value)
            if histogram is not None:
                found[path] = histogram
    return found


def worst_codes(
    layers: Sequence[LayerError], histograms: Mapping[str, CodeHistogram]
) -> tuple[WorstCodes, ...]:
    """Of those with a histogram, the few that lost most, the worst first.

    By what is left of rounding's output error, and of equals by the error of the weights; where no
    layer has an output error, by that alone.
    """
    told = [one for one in layers if one.path in histograms]
    calibrated = [one for one in told if one.of_rounding is not None]
    ranked = sorted(
        calibrated or told,
        key=lambda one: (one.of_rounding or 0.0, one.weight_error or 0.0),
        reverse=True,
    )
    return tuple(
        WorstCodes(
            layer=one,
            histogram=histograms[one.path],
            codes=_codes_figure(f"codes-{i}", histograms[one.path]),
            scales=_scales_figure(f"scales-{i}", histograms[one.path]),
        )
        for i, one in enumerate(ranked[:_NUM_SHOWN], start=1)
    )


def _codes_figure(name: str, histogram: CodeHistogram) -> Figure:
    width, whole = histogram.codes_per_bin, histogram.num_weights
    values: list[Spec] = []
    for i, count in enumerate(histogram.codes):
        first = histogram.lowest + i * width
        values.append(
            {
                "from": first - 0.5,
                "to": first + width - 0.5,
                "code": str(first) if width == 1 else f"{first} to {first + width - 1}",
                "share": float(f"{count / whole:.4g}"),
                "count": count,
            }
        )
    return _bars(
        name,
        "Codes",
        values,
        x={"title": "code", "axis": {"tickMinStep": 1, "grid": False, "labelOverlap": "greedy"}},
        domain=[values[0]["from"], values[-1]["to"]],
        tooltip=[{"field": "code"}, {"field": "count", "title": "weights", "format": ","}],
    )


def _scales_figure(name: str, histogram: CodeHistogram) -> Figure:
    whole = sum(histogram.scales)
    width = 2 * SCALE_OCTAVES / NUM_SCALE_BINS
    values: list[Spec] = []
    for i, count in enumerate(histogram.scales):
        low, high = (2 ** (-SCALE_OCTAVES + width * (i + j)) for j in (0, 1))
        within = f"{low:.2f} to {high:.2f}"
        if i == 0:
            within = f"below {high:.2f}"
        elif i == NUM_SCALE_BINS - 1:
            within = f"above {low:.2f}"
        values.append(
            {
                "from": float(f"{low:.5g}"),
                "to": float(f"{high:.5g}"),
                "scale": within,
                "share": float(f"{count / whole:.4g}"),
                "count": count,
            }
        )
    octaves = range(-SCALE_OCTAVES, SCALE_OCTAVES + 1)
    return _bars(
        name,
        "Scales",
        values,
        x={
            "title": "scale / median",
            "scale": {"type": "log", "base": 2},
            "axis": {
                "values": [2.0**one for one in octaves],
                "format": "~g",
                "grid": False,
                "labelFlush": False,
            },
        },
        domain=[2.0**-SCALE_OCTAVES, 2.0**SCALE_OCTAVES],
        tooltip=[
            {"field": "scale", "title": "times the median"},
            {"field": "count", "title": "scales", "format": ","},
        ],
    )


def _bars(
    name: str, title: str, values: list[Spec], *, x: Spec, domain: list[float], tooltip: list[Spec]
) -> Figure:
    return figure(
        name,
        title,
        "What share of all has each value.",
        data={"values": values},
        height=_HEIGHT,
        mark={"type": "bar", "color": _COLOR, "binSpacing": 1},
        encoding={
            "x": {
                "field": "from",
                "type": "quantitative",
                "bin": {"binned": True},
                **x,
                "scale": {**x.get("scale", {}), "domain": domain, "nice": False},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": None,
                "axis": {"format": ".0%", "tickCount": 3, "minExtent": 34},
            },
            "tooltip": [*tooltip, {"field": "share", "format": ".2%"}],
        },
    )
