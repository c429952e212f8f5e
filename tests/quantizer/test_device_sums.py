"""A Gram on a device is solved there, with the results of one in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantizer import AWQScheme, GPTQScheme, HessianSum, Scheme, solve, solve_stack
from quantizer.errors import UnusableStatisticsError
from tests.quantizer.device_arrays import OnDevice
from tests.selection import by_default

ROWS = np.random.default_rng(0).standard_normal((160, 48)).astype(np.float32)
ROWS[:, 5] = 0  # an input that calibration never saw
WEIGHTS = np.random.default_rng(1).standard_normal((2, 16, 48)).astype(np.float32)

SCHEMES: dict[str, Scheme] = {
    "gptq": GPTQScheme(weight_bits=3, group_size=16, activation_order=True, refinement_sweeps=1),
    "awq": AWQScheme(group_size=16, num_grid_points=3),
    "awq-foldable": AWQScheme(group_size=16, num_grid_points=3, foldable=True),
}


def on_device(total: HessianSum) -> HessianSum:
    return HessianSum(OnDevice(total.gram_CC), total.num_rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", by_default(list(SCHEMES), ["gptq", "awq-foldable"]))
def test_it_is_solved_where_it_is_to_the_same_bits(name: str) -> None:
    total = HessianSum.of(ROWS)
    ours = solve_stack(list(WEIGHTS), on_device(total), SCHEMES[name])
    theirs = solve_stack(list(WEIGHTS), total, SCHEMES[name])
    for one, other in zip(ours, theirs, strict=True):
        assert one.report == other.report
        assert one.report.dead_inputs == 1
        np.testing.assert_array_equal(one.weight.dequantize(), other.weight.dequantize())


def test_it_is_merged_there() -> None:
    halves = [HessianSum.of(ROWS[:70]), HessianSum.of(ROWS[70:])]
    merged = on_device(halves[0]).merge(on_device(halves[1]))
    assert isinstance(merged.gram_CC, OnDevice)
    expected = halves[0].merge(halves[1])
    assert merged.num_rows == expected.num_rows
    np.testing.assert_array_equal(np.asarray(merged.gram_CC.__jax_array__()), expected.gram_CC)


CHANGES: dict[str, tuple[Any, str]] = {
    "nan": (lambda gram: gram * np.nan, "NaN or infinity"),
    "infinity": (lambda gram: gram + np.float32(np.inf), "NaN or infinity"),
    "zero": (lambda gram: gram * 0, "every calibration input"),
    "negative": (lambda gram: -gram, "negative diagonal"),
    "narrow": (lambda gram: gram[:40, :40], "48 input features"),
    # Its sum overflows, though no element does.
    "huge": (lambda gram: gram * 0 + np.float32(1e37), "largest mean square"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_checked_there(name: str) -> None:
    change, problem = CHANGES[name]
    total = HessianSum.of(ROWS)
    with np.errstate(all="ignore"):
        changed = HessianSum(change(total.gram_CC), total.num_rows)
    for given in (changed, on_device(changed)):
        with pytest.raises(UnusableStatisticsError, match=problem):
            solve(WEIGHTS[0], given, SCHEMES["gptq"])


def test_the_double_cannot_be_copied() -> None:
    with pytest.raises(AssertionError, match="copied to the host"):
        np.asarray(OnDevice(ROWS))
    with pytest.raises(AssertionError, match="copied to the host"):
        np.diagonal(on_device(HessianSum.of(ROWS)).gram_CC)
