"""Markdown from a template, in which no value can be anything but text.

Names of folders, layers and recipes come from anyone. Every value that a template prints is escaped
unless it was made by one of the functions here.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

import jinja2
import yaml

# A colon or a dot only where they would make a link; a mark of a list only where a line begins.
_SPECIAL = re.compile(
    r"([\\`*_{}\[\]()#+!|<>&~$@]|:(?=//)|(?<=www)\.|^[-=]|(?<=^\d)[.)](?=\s))", re.I
)
_LONGEST = 300


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escaped(value: object) -> Markdown:
    """A value as plain text within a line: no markup, link, mention, table cell or line break."""
    return Markdown(_SPECIAL.sub(r"\\\1", _one_line(value)))


def code(value: object) -> Markdown:
    """A value as code within a line, or within a cell of a table."""
    text = _one_line(value).replace("|", "¦")  # a bar would end the cell, even within code
    fence = "`" * (_longest_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{padding}{text}{padding}{fence}" if text else "")


def block(text: str, language: str) -> Markdown:
    """Lines of code as they are."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def yaml_text(value: object) -> str:
    """Plain values as YAML, keys in their order, one way to write each value."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000)
    return text


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder."""
    filled = _environment().get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", filled)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.release", ""),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _one_line(value: object) -> str:
    """Without control characters, and not endless."""
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(value))
    text = " ".join(visible.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
