"""Which cases of a parametrized test run by default; the others are marked `exhaustive`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def covering(*axes: Iterable[Any], default: Sequence[Collection[Any]] = ()) -> list[Any]:
    """Return every combination of the axes' values, for a test of one argument an axis.

    By default the test runs on so few of them that each value occurs: on the axes' first values,
    then on their second ones, starting again on the shorter axes.

    Args:
        default: for each axis, the values that are to occur; none for all of them.
    """
    values = [list(axis) for axis in axes]
    chosen = [list(axis) for axis in default] or values
    inside = all(set(some) <= set(axis) for some, axis in zip(chosen, values, strict=True))
    assert inside, "a default that is no value"
    longest = max(map(len, chosen))
    covered = {tuple(axis[i % len(axis)] for axis in chosen) for i in range(longest)}
    return [_case(case, case in covered) for case in itertools.product(*values)]


def by_default(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return all values, for a test of one argument that runs on `default` by default."""
    cases = list(values)
    assert set(default) <= set(cases), "a default that is no case"
    return [_case((value,), value in default) for value in cases]


def _case(values: tuple[Any, ...], is_default: bool) -> Any:
    marks = () if is_default else pytest.mark.exhaustive
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)
