"""The demo's texts: enough of each kind, and none both to calibrate on and to judge by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.demo.kinds import write_kinds


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in write_kinds(tmp_path_factory.mktemp("kinds"))
    }


def paragraphs(documents: list[str]) -> set[str]:
    return {
        one for text in documents for one in map(str.strip, text.split("\n\n")) if len(one) >= 100
    }


def test_no_prose_is_both_to_calibrate_on_and_to_judge_by(kinds: dict[str, list[str]]) -> None:
    seen = {name: paragraphs(texts) for name, texts in kinds.items()}
    judging = seen["evaluation-manual"] | seen["evaluation-licenses"]
    for name in ("calibration-manual", "calibration-services"):
        assert not seen[name] & judging
    # Modules repeat their licenses, and little else.
    assert not set(kinds["calibration-code"]) & set(kinds["evaluation-code"])


def test_there_is_enough_of_each(kinds: dict[str, list[str]]) -> None:
    recipe = yaml.safe_load(Path(__file__).with_name("recipe.yaml").read_text())
    named = {Path(one["url"]).stem for one in recipe["calibration"]["texts"]}
    assert named == {name for name in kinds if name.startswith("calibration")}
    for name, texts in kinds.items():
        # A token has about four characters; a pool holds eight times the windows that are taken.
        assert sum(map(len, texts)) > (4 * 8 * 8 * 512 if name in named else 4 * 4 * 512), name
