"""A picture of a page, as a Vega-Lite specification.

Vega-Lite (Satyanarayan et al., IEEE TVCG 2017) draws it in the reader's browser, as SVG: text stays
text, each mark says what it stands for, and lines take the page's colours, dark or light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
"""A specification as plain JSON values."""

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is fetched
_INK = "currentColor"
NUMBERS: Spec = {"labelAngle": 0, "labelOverlap": "greedy", "ticks": False}
"""An axis with as many of its numbers as there is room for."""

AS_GIVEN: Spec = {"field": "row", "op": "min"}
"""The order of `row`, a number in the data.

Values that a specification itself lists become code, which no name must.
"""
_CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "tickColor": _INK,
        "domainColor": _INK,
        "gridColor": _INK,
        "gridOpacity": 0.15,
        "titleFontWeight": "normal",
        "labelLimit": 260,
    },
    "legend": {"labelColor": _INK, "titleColor": _INK, "titleFontWeight": "normal"},
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture and what it says.

    Attributes:
        name: its anchor in the page.
        caption: what a reader sees in it, and how to read it.
    """

    name: str
    title: str
    caption: str
    spec: Spec


def figure(name: str, title: str, caption: str, **spec: Any) -> Figure:
    """A picture as wide as the page, in the page's colours.

    Args:
        spec: the rest of its specification.
    """
    whole = {
        "$schema": _SCHEMA,
        "description": f"{title}. {caption}",
        "width": "container",
        "config": _CONFIG,
        **spec,
    }
    return Figure(name=name, title=title, caption=caption, spec=whole)
