"""How far something is can be read on any terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from jobs.progress.bar import HowFar


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
@pytest.mark.parametrize(
    "name", ["catalog", "Llama3Backbone × gptq-w4-g128-searched", "日本語" * 20]
)
def test_a_narrow_terminal_shortens_bar_and_name_and_no_number(name: str, width: int) -> None:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(HowFar(Text(name), 64, 128, "parts"))
    [line] = console.export_text().splitlines()
    assert line.rstrip().endswith("64/128 parts")
    assert 2 <= line.count("━") + line.count("╸") <= 40
    assert Text(line.rstrip()).cell_len <= width
    assert line.startswith(name[:2])
    if width == 120 and len(name) < 60:
        assert line.startswith(f"{name} ━")
