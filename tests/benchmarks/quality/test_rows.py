"""Rows: one line of text says all that is quantized how."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.recipe.recipe_file import load_recipe
from quantizer.schemes import GPTQScheme
from tests.benchmarks.quality.rows import Row

TEXTS = {"manual": Path("/t/manual.jsonl"), "novels": Path("/t/novels.jsonl")}


@pytest.mark.parametrize(
    "text", ["quantfleet 3", "quantfleet int8", "gptqmodel 2 {mse: 2.4, sym: false}"]
)
def test_a_row_reads_what_it_writes(text: str) -> None:
    assert str(Row.parse(text)) == text


@pytest.mark.parametrize("text", ["", "quantfleet", "quantfleet 3 {mse}x", "a 3 {[1]}"])
def test_what_is_no_row_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no row"):
        Row.parse(text)


def test_options_go_where_they_belong() -> None:
    row = Row.parse("quantfleet 3 {hessian_damping: 0.1, texts: [manual, novels], num_samples: 8}")
    calibration = row.calibration(TEXTS, 5)
    assert calibration.texts == ("/t/manual.jsonl", "/t/novels.jsonl")
    assert (calibration.num_samples, calibration.seed) == (8, 5)
    recipe = row.our_recipe(calibration)
    builtin = load_recipe("gptq-w3-g64")
    assert isinstance(recipe.scheme, GPTQScheme)
    assert isinstance(builtin.scheme, GPTQScheme)
    assert recipe.scheme.hessian_damping == 0.1
    assert recipe.scheme.refinement_sweeps == builtin.scheme.refinement_sweeps
    assert recipe.embeddings is None
    assert recipe.calibration == calibration


def test_a_built_in_recipe_keeps_its_embeddings() -> None:
    row = Row.parse("quantfleet gptq-w3-g64")
    recipe = row.our_recipe(row.calibration(TEXTS, 0))
    assert recipe.embeddings == load_recipe("gptq-w3-g64").embeddings is not None


def test_widths_are_chosen_among_those_of_the_built_in_gptq() -> None:
    row = Row.parse("quantfleet auto {target_bits: 3.5, choices: [2, 3, 4]}")
    recipe = row.our_recipe(row.calibration(TEXTS, 2))
    assert isinstance(recipe, AutoRecipe)
    assert (recipe.scheme.target_bits, recipe.scheme.choices) == (3.5, (2, 3, 4))
    assert recipe.scheme.of_width(3) == load_recipe("gptq-w3-g64").scheme
    assert (recipe.embeddings, recipe.calibration.seed) == (None, 2)


def test_unknown_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="'poems' is none of manual, novels"):
        Row.parse("quantfleet 3 {texts: [poems]}").calibration(TEXTS, 0)
