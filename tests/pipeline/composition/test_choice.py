"""The programme finds what trying every choice finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.composition.choice
from pipeline.composition.choice import Choice, Choices, Option

# Multiples of 1/64, so that sums are exact in any order; few values, so that many choices tie.
COST = st.integers(0, 12).map(lambda value: value / 64)
OPTION = st.builds(Option, size_bytes=st.integers(1, 9), cost=COST)
BLOCKS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=5)


def every_choice(blocks: Sequence[Sequence[Option]]) -> list[Choice]:
    found = []
    for picked in itertools.product(*(range(len(block)) for block in blocks)):
        options = [block[one] for block, one in zip(blocks, picked, strict=True)]
        found.append(
            Choice(
                picked=picked,
                size_bytes=sum(option.size_bytes for option in options),
                cost=sum(option.cost for option in options),
            )
        )
    return found


@given(BLOCKS, st.integers(0, 50))
def test_it_is_the_best_of_all_choices_within_the_budget(
    blocks: list[list[Option]], most_bytes: int
) -> None:
    fitting = [choice for choice in every_choice(blocks) if choice.size_bytes <= most_bytes]
    best = min(fitting, key=lambda x: (x.cost, x.size_bytes, x.picked), default=None)
    assert Choices(blocks).within(most_bytes) == best


@given(BLOCKS)
def test_the_curve_has_the_best_choice_of_every_size(blocks: list[list[Option]]) -> None:
    every, choices = every_choice(blocks), Choices(blocks)
    best = [
        one
        for one in every
        if not any(x.cost <= one.cost and x.size_bytes < one.size_bytes for x in every)
        and not any(x.cost < one.cost and x.size_bytes <= one.size_bytes for x in every)
    ]
    curve = choices.curve(choices.most_bytes - choices.least_bytes + 1)
    assert {(x.size_bytes, x.cost) for x in curve} == {(x.size_bytes, x.cost) for x in best}
    assert [x.size_bytes for x in curve] == sorted({x.size_bytes for x in best})


def test_sizes_too_many_to_count_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    blocks = []
    for _ in range(7):
        sizes = np.sort(random.integers(10**8, 4 * 10**8, 3))
        costs = np.sort(random.random(3))[::-1]
        blocks.append(
            [
                Option(size_bytes=int(size), cost=float(cost))
                for size, cost in zip(sizes, costs, strict=True)
            ]
        )
    every = every_choice(blocks)
    for resolution in (pipeline.composition.choice.RESOLUTION, 40):
        monkeypatch.setattr(pipeline.composition.choice, "RESOLUTION", resolution)
        choices = Choices(blocks)
        # Each block wastes less than a unit.
        wasted = len(blocks) * -(-(choices.most_bytes - choices.least_bytes) // resolution)
        for most_bytes in range(choices.least_bytes + wasted, choices.most_bytes, 10**8):
            found = choices.within(most_bytes)
            assert found is not None
            assert found.size_bytes <= most_bytes
            best = min(x.cost for x in every if x.size_bytes <= most_bytes - wasted)
            assert found.cost <= best + 1e-12
