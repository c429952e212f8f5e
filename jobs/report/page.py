"""A page as one file: template, style, pictures and what draws them; nothing is loaded.

Every value is escaped by the template engine. The page's policy lets only its own scripts run,
named by their digests, so that a name from a source could do nothing even if it were markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from jobs.report.figure import Figure

_DRAWING = ("vega.js", "draw.js")


def page(
    template: str, figures: Sequence[Figure], *, scripts: Sequence[str] = (), **values: Any
) -> bytes:
    """Fill a template of this folder, which extends `page.html.jinja`.

    Args:
        figures: that the template places, by `figure(name)` of `figure.jinja`.
        scripts: others of this folder that the page needs, beside those that draw.
    """
    by_name = {one.name: one for one in figures}
    texts = [_text(name) for name in (*(_DRAWING if figures else ()), *scripts)]
    policy = " ".join(f"'sha256-{_digest(text)}'" for text in texts) or "'none'"
    filled = (
        _environment()
        .get_template(template)
        .render(
            values
            | {
                "figures": by_name,
                "script_policy": Markup(policy),  # base64 between quotes
                "scripts": [Markup(text) for text in texts],
                # The scripts' licenses ask to be given along with them.
                "notices": Markup(_text("vega.LICENSE")) if figures else "",
                "style": Markup(_text("page.css")),
            }
        )
    )
    return filled.encode()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _text(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json_data"] = _json_data
    return environment


def _json_data(value: Any) -> Markup:
    """JSON for a data block of HTML, which no text in it can close."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
