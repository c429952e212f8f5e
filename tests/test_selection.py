"""The default cases of a parametrized test meet every value; none is lost."""

import itertools

import pytest

from tests.selection import by_default, covering


def split(cases):
    default = [case.values for case in cases if not case.marks]
    return default, [case.values for case in cases if case.marks]


@pytest.mark.parametrize("axes", [("abc",), ("ab", "vwxyz"), ("abcd", "xy", "123")])
def test_covering_meets_each_value_by_default_and_each_combination_in_all(axes):
    default, exhaustive = split(covering(*axes))
    assert sorted(default + exhaustive) == sorted(itertools.product(*axes))
    assert len(default) == max(map(len, axes))
    for position, axis in enumerate(axes):
        assert {case[position] for case in default} == set(axis)


def test_covering_may_meet_some_values_alone_by_default():
    default, exhaustive = split(covering("abc", "wxyz", default=("abc", "xy")))
    assert sorted(default) == [("a", "x"), ("b", "y"), ("c", "x")]
    assert sorted(default + exhaustive) == sorted(itertools.product("abc", "wxyz"))
    with pytest.raises(AssertionError, match="no value"):
        covering("abc", "wxyz", default=("abc", "q"))


def test_by_default_keeps_the_others_exhaustive():
    assert split(by_default("abc", "b")) == ([("b",)], [("a",), ("c",)])
    with pytest.raises(AssertionError, match="no case"):
        by_default("abc", "d")
