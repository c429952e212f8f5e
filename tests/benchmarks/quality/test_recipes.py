"""The page of recipes says what was measured, and of all else that it was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.recipe.measured import MEASURED_FILE, MeasuredRecipe, how_measured, measured_recipes
from pipeline.recipe.recipe_file import builtin_recipes
from tests.benchmarks.quality.recipes import PAGE, collect, page
from tests.benchmarks.quality.results import FULL, METRICS, QUICK, Judged, Results


def judged(row: str, draw: int, kl: float, seconds: float, form: str = FULL) -> Judged:
    values = {kind: {metric: [kl, 3 * kl] for metric in METRICS} for kind in ("manual", "novels")}
    return Judged(
        key=f"{row}{draw}{form}", row=row, draw=draw, form=form, version="1",
        seconds={"quantizing": seconds}, machine="m", values=values,
    )  # fmt: skip


def test_figures_are_means_over_draws_and_times_relative_to_the_plainest(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for row, draw, kl, seconds in (
        ("quantfleet int8", 0, 0.001, 10.0),
        ("quantfleet gptq-w4-g64", 0, 0.01, 24.0),
        ("quantfleet gptq-w4-g64", 1, 0.03, 25.0),
    ):
        results.append(judged(row, draw, kl, seconds))
    results.append(judged("quantfleet gptq-w2-g64", 0, 1.0, 1.0, form=QUICK))
    content = collect(results)
    assert content["recipes"].keys() == {"int8", "gptq-w4-g64"}, "the quick form is no measure"
    found = MeasuredRecipe(**content["recipes"]["gptq-w4-g64"])
    assert found.divergence["novels"] == pytest.approx(0.04)
    assert (found.relative_seconds, found.num_draws) == (2.5, 2)
    assert "judged on 2 windows each of manual, novels" in content["measure"]
    lines = page(content).splitlines()
    assert "| `gptq-w4-g64` | 4 | 0.04 manual, 0.04 novels | 2.5 × |" in lines
    assert "| `gptq-w2-g64` | 2 | not measured | not measured |" in lines


def test_without_the_plainest_no_time_is_said(tmp_path: Path) -> None:
    Results(tmp_path).append(judged("quantfleet gptq-w4-g64", 0, 0.01, 24.0))
    found = MeasuredRecipe(**collect(Results(tmp_path))["recipes"]["gptq-w4-g64"])
    assert found.time_text == "not measured"


def test_the_page_is_that_of_what_the_package_knows() -> None:
    assert PAGE.read_text() == page(json.loads(MEASURED_FILE.read_text()))
    assert measured_recipes().keys() <= builtin_recipes().keys()
    assert bool(how_measured()) == bool(measured_recipes())
