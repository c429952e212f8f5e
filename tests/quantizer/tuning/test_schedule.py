"""A schedule is the same everywhere, uses all there is, and keeps what it judges by apart."""

from __future__ import annotations

from collections import Counter

import pytest

from quantizer.tuning.schedule import make_schedule


@pytest.mark.parametrize(
    ("number", "held_back"), [(2, (1,)), (7, (6,)), (16, (7, 12)), (35, (7, 12, 17, 30))]
)
def test_what_is_held_back_is_never_trained_on_and_all_else_is_as_often(
    number: int, held_back: tuple[int, ...]
) -> None:
    found = make_schedule(number, held_back=held_back, steps=40, batch=3, seed=5, block=2)
    assert found.held_back == held_back
    counts = Counter(place for step in found.steps for place in step)
    assert sorted({*counts, *found.held_back}) == list(range(number))
    assert not set(counts) & set(found.held_back)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {len(step) for step in found.steps} == {3}
    assert len(found.steps) == 40


def test_it_is_fixed_by_seed_and_block() -> None:
    def drawn(seed: int, block: int) -> tuple[tuple[int, ...], ...]:
        return make_schedule(9, held_back=(7,), steps=4, batch=2, seed=seed, block=block).steps

    assert drawn(0, 0) == ((3, 2), (1, 6), (0, 8), (4, 5))
    assert len({drawn(seed, block) for seed in range(3) for block in range(3)}) == 9
