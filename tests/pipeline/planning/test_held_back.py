"""Windows that are held back are few, spread evenly, and the same for everyone."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import RecipeError
from pipeline.planning.held_back import held_back_every
from pipeline.recipe.recipe import Tuning
from pipeline.tokens_plan import TokensPlan
from tests.pipeline.planning.small_plans import GPTQ, layer, plan

CORRECTED = layer("up", 64, 128, scheme=dataclasses.replace(GPTQ, drift_correction=1.0))


def tokens(num_samples: int, micro_batch: int) -> TokensPlan:
    given = plan().tokens
    assert given is not None
    return dataclasses.replace(given, num_samples=num_samples, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("num_samples", "micro_batch", "expected"),
    [
        (16, 1, [7, 12]),
        (20, 1, [7, 12, 17]),
        (3, 1, [2]),
        (2, 1, [1]),
        (18, 4, [16, 17]),
        (64, 4, [28, 29, 30, 31, 48, 49, 50, 51]),
    ],
)
def test_one_micro_batch_in_eight_or_the_last(
    num_samples: int, micro_batch: int, expected: list[int]
) -> None:
    given = tokens(num_samples, micro_batch)
    assert given.num_held_back == 0
    every = held_back_every(plan().recipe, [[CORRECTED]], given)
    found = dataclasses.replace(given, held_back_every=every)
    starts = range(0, num_samples, micro_batch)
    held = [start for start in starts if found.is_held_back(start)]
    ends = [min(start + micro_batch, num_samples) for start in held]
    assert [w for a, b in zip(held, ends, strict=True) for w in range(a, b)] == expected
    assert found.num_held_back == len(expected)


@pytest.mark.parametrize("num_sources", [2, 3, 4, 8])
def test_sources_that_alternate_are_all_held_back_of(num_sources: int) -> None:
    found = dataclasses.replace(tokens(64, 1), held_back_every=8)
    held = [window for window in range(64) if found.is_held_back(window)]
    assert len(held) == 8
    assert {window % num_sources for window in held} == set(range(num_sources))


def test_none_is_held_back_where_nothing_is_judged() -> None:
    assert held_back_every(plan().recipe, [[layer("up", 64, 128)]], tokens(16, 1)) == 0


def test_tuning_is_judged_too() -> None:
    recipe = plan().recipe.model_copy(update={"tuning": Tuning()})
    assert held_back_every(recipe, [[layer("up", 64, 128)]], tokens(16, 1)) == 8
    with pytest.raises(RecipeError, match=r"tuning is judged .* or leave tuning out"):
        held_back_every(recipe, [[layer("up", 64, 128)]], tokens(4, 4))


def test_of_a_single_micro_batch_nothing_can_be_held_back() -> None:
    with pytest.raises(RecipeError, match="give num_samples more than 4") as raised:
        held_back_every(plan().recipe, [[CORRECTED]], tokens(4, 4))
    assert "\n" not in str(raised.value)
