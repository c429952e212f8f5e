"""Which cases of a parametrized test run by default; the others are marked `exhaustive`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Return every combination of the axes' values, for a test of one argument an axis.

    By default the test runs on so few of them that each value occurs: on the axes' first values,
    then on their second ones, starting again on the shorter axes.
    """
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    default = {tuple(axis[i % len(axis)] for axis in values) for i in range(longest)}
    return [_case(case, case in default) for case in itertools.product(*values)]


def by_default(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Return all values, for a test of one argument that runs on `default` by default."""
    cases = list(values)
    assert set(default) <= set(cases), "a default that is no case"
    return [_case((value,), value in default) for value in cases]


def _case(values: tuple[Any, ...], is_default: bool) -> Any:
    marks = () if is_default else pytest.mark.exhaustive
    return pytest.param(*values, id="-".join(map(str, values)), marks=marks)
