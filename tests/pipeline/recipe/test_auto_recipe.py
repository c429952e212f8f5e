"""A recipe that names a size stands for ordinary ones, and a mistake in it costs one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.recipe.recipe_file import any_recipe_from_dict, builtin_recipes, parse_recipe
from quantizer.schemes import GPTQScheme

AUTO = {"mode": "auto", "target_bits": 3.5}


def given(scheme: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    texts = {"texts": ["a.jsonl"]}
    return {"name": "a", "scheme": AUTO | (scheme or {}), "calibration": texts} | values


def test_it_stands_for_recipes_that_differ_in_width_alone() -> None:
    rule = {"pattern": "output", "scheme": {"mode": "int8"}}
    auto = any_recipe_from_dict(
        given(
            {"choices": [2, 3, 4], "group_size": 64, "scale_search": False},
            rules=[rule],
            embeddings={"mode": "int8"},
            dtype="bfloat16",
            servable=True,
        )
    )
    assert isinstance(auto, AutoRecipe)
    schemes = [recipe.scheme for recipe in auto.recipes]
    accurate = builtin_recipes()["gptq-w3-g64"].scheme
    assert isinstance(accurate, GPTQScheme)
    assert schemes == [
        replace(accurate, weight_bits=bits, scale_search=False) for bits in (2, 3, 4)
    ]
    assert [recipe.name for recipe in auto.recipes] == ["a-w2", "a-w3", "a-w4"]
    same = [{**recipe.to_dict(), "name": "", "scheme": None} for recipe in auto.recipes]
    assert same[0] == same[1] == same[2]
    assert all(recipe.uses_float_statistics for recipe in auto.recipes)
    assert same[0]["rules"][0]["pattern"] == "output"
    assert (same[0]["dtype"], same[0]["servable"]) == ("bfloat16", True)


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"target_bits": 3, "by_layers": False},
        {"choices": [4, 8], "symmetric": True, "correlation_shrinkage": 0.0},
    ],
)
def test_it_comes_back_from_what_it_is_stored_as(scheme: dict[str, Any]) -> None:
    auto = any_recipe_from_dict(given(scheme))
    again = any_recipe_from_dict(auto.to_dict())
    assert again == auto
    assert again.to_dict() == auto.to_dict()


@pytest.mark.parametrize(
    ("scheme", "values", "problem"),
    [
        ({"target_bits": None}, {}, "scheme: auto needs a size: target_bits, such as 3.5"),
        ({"target_bytes": 9}, {}, "and not both"),
        ({"target_bits": "3.5"}, {}, "target_bits must be a number such as 3.5, got '3.5'"),
        ({"target_bits": 0}, {}, "target_bits must be more than 0"),
        ({"target_bits": 5e9}, {}, "no weight takes 5e+09 bits; target_bytes counts bytes"),
        ({"choices": [2, 5]}, {}, "choices: 5 is no width of gptq"),
        ({"choices": [2, "int8"]}, {}, "choices: 'int8' is no width of gptq"),
        ({"choices": [2, {"mode": "awq"}]}, {}, "give layers another scheme by a rule"),
        ({"choices": [4]}, {}, "choices must be two widths at least"),
        ({"choices": [4, 2]}, {}, "from few bits to many"),
        ({"choices": 4}, {}, "choices must be a list"),
        ({"measure_windows": 0}, {}, "measure_windows must be a whole number from 1"),
        ({"weight_bits": 3}, {}, "weight_bits is what auto chooses"),
        ({"group_sise": 3}, {}, "scheme 'auto' has no field 'group_sise'; its fields are target"),
        ({"group_size": 0}, {}, "GPTQScheme.group_size must be -1"),
        ({"drift_correction": 1.0}, {}, "drift_correction corrects"),
        ({}, {"tuning": {"steps": 3}}, "leave tuning out"),
        ({}, {"calibration": None}, "auto must see texts"),
        (
            {},
            {"calibration": {"texts": ["a"], "statistics": "sequential"}},
            "write statistics: float, or leave it out",
        ),
        (
            {},
            {"rules": [{"pattern": "x", "scheme": {"mode": "float8"}}]},
            "rules: x: float8 needs more than the stored sums",
        ),
        (
            {},
            {"rules": [{"pattern": "x", "scheme": AUTO}]},
            "mode: auto is for the scheme of a whole recipe",
        ),
        ({}, {"embeddings": AUTO}, "mode: auto is for the scheme of a whole recipe"),
        ({}, {"tunning": {}}, "unknown key tunning; the keys here are name, scheme"),
        ({}, {"name": "a" * 61}, "name must match"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    scheme: dict[str, Any], values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        any_recipe_from_dict(given(scheme, **values))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mistake_is_told_with_its_line() -> None:
    text = "name: a\nscheme:\n  mode: auto\n  target_bits: 3\n  choices: [2, 5]\n"
    with pytest.raises(RecipeError, match=r"^f\.yaml:5: scheme: choices: 5 is no width"):
        parse_recipe(text + "calibration: {texts: [a.jsonl]}\n", where="f.yaml")
