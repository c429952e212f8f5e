"""What is known of KerasHub's families is complete, and is what trying them gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.families.matrix import SCHEMES, attempt
from tests.families.support_table import PAGE, page
from tests.families.tiny_families import (
    FAMILIES,
    OUT_OF_SCOPE,
    Family,
    exported_backbones,
    not_yet_tried,
    shared_family,
)

pytestmark = [
    # KerasHub's own: RWKV7 tells of a package that would be faster, T5 drops Keras' masks.
    pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package is not installed:UserWarning"),
    # Keras says first what then fails, of a block that it cannot build quantized.
    pytest.mark.filterwarnings("ignore:Layer '.*' looks like it has unbuilt state:UserWarning"),
    pytest.mark.filterwarnings("ignore:`build..` was called on layer '.*', however:UserWarning"),
    pytest.mark.filterwarnings("ignore:Layer '.*' .of type T5.* was passed an input with a mask"),
]

# One that is refused, which is quick.
_BY_DEFAULT = ("SmolLM3",)
# Another of each kind of model and of outcome.
_EXHAUSTIVE = (
    "Albert",
    "Bert",
    "Electra",
    "Gemma4",
    "Gemma3n",
    "GptOss",
    "Moonshine",
    "OPT",
    "QwenMoe",
    "RWKV7",
)


def _case(family: Family) -> Any:
    if family.name in _BY_DEFAULT:
        return pytest.param(family, id=family.name)
    often = family.name in _EXHAUSTIVE
    marks = pytest.mark.exhaustive if often else pytest.mark.slow
    return pytest.param(family, id=family.name, marks=marks)


def test_every_family_that_kerashub_exports_is_tried_or_out_of_scope() -> None:
    assert not_yet_tried() == []
    listed = {family.backbone for family in FAMILIES} | OUT_OF_SCOPE.keys()
    assert {name.removesuffix("Backbone") for name in listed} == {
        name.removesuffix("Backbone") for name in exported_backbones()
    }


def cells(text: str) -> dict[str, list[str]]:
    """The table of the page: the outcome with each scheme by family, with the notes in full."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        family: [re.sub(r"\((\d+)\)$", lambda found: notes[found[1]], cell) for cell in row]
        for family, *row in rows[2:]
    }


def test_the_page_lists_every_family_and_none_that_fails() -> None:
    committed = cells(PAGE.read_text(encoding="utf-8"))
    assert list(committed) == [family.name for family in FAMILIES]
    assert not [row for row in committed.values() if any("fails" in cell for cell in row)]


@pytest.mark.parametrize("family", [_case(family) for family in FAMILIES])
def test_the_page_says_what_trying_a_family_gives(family: Family, tmp_path: Path) -> None:
    source = shared_family(family.name)
    outcomes = [attempt(family, source, scheme, tmp_path / scheme) for scheme in SCHEMES]
    committed = cells(PAGE.read_text(encoding="utf-8"))
    assert cells(page(outcomes))[family.name] == committed[family.name]
