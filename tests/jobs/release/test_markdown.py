from __future__ import annotations

import pytest
import yaml
from markdown_it import MarkdownIt

from jobs.release.markdown import block, code, escaped, yaml_text

HOSTILE = [
    "# heading",
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![image](https://evil.example/x.png)",
    "https://evil.example and www.evil.example",
    "`code` and ``more``",
    "| cell | cell |",
    "a\n\n---\nb",
    "- item",
    "1. item",
    "*bold* _italic_ ~gone~",
    "\\",
    "\u202eright to left\u0000",
    "x" * 5000,
]


def tokens(text: str) -> list[str]:
    found = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(text)
    return [token.type for one in found for token in [one, *(one.children or [])]]


@pytest.mark.parametrize("text", HOSTILE)
def test_an_escaped_value_is_nothing_but_text(text: str) -> None:
    made = escaped(text)
    kinds = {kind for kind in tokens(made) if kind not in ("text", "text_special", "inline")}
    assert kinds <= {"paragraph_open", "paragraph_close"}
    assert len(made) < 1000


@pytest.mark.parametrize("text", HOSTILE)
def test_code_stays_in_its_cell(text: str) -> None:
    table = f"| a | b |\n| --- | --- |\n| {code(text)} | {escaped(text)} |\n"
    kinds = tokens(table)
    assert kinds.count("td_open") == 2
    assert kinds.count("code_inline") == 1
    assert not {"html_inline", "link_open", "image", "heading_open"} & set(kinds)


@pytest.mark.parametrize("text", ["a\n```\n# out", "````\n", "~~~\nx"])
def test_a_block_of_code_ends_where_it_ends(text: str) -> None:
    assert tokens(f"{block(text, 'yaml')}\n") == ["fence"]


def test_yaml_reads_back() -> None:
    values = {"a": "no", "b": "- x: y", "c": ["---", "multi\nline", "’"], "d": None}
    assert yaml.safe_load(yaml_text(values)) == values
