"""Sums have NumPy's bits wherever they are added, and a merge on a device takes no memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.run.worker_api import InputSum
from pipeline.worker import statistics
from pipeline.worker.statistics import finished, in_numpy, merged, sum_inputs

SIZE = 516
"""Enough for a Gram in bands, whose widths differ."""


def summed(kind: StatisticsKind, seed: int) -> InputSum:
    group = InputGroup(targets=("dense",), in_features=SIZE, statistics=kind)
    rows = np.random.default_rng(seed).standard_normal((2, 8, SIZE)).astype(np.float32)
    mask = np.arange(8)[None] < np.array([[8], [5]])
    return sum_inputs([(jnp.asarray(rows), mask)], group, (-1,))


def fields(total: InputSum) -> dict[str, Any]:
    found = finished(total)
    return {name: getattr(found, name) for name in found.__slots__}


@pytest.mark.parametrize("kind", ["hessian", "magnitudes"])
def test_sums_merged_on_a_device_have_the_bits_of_those_merged_in_numpy(
    kind: StatisticsKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = summed(kind, 0), summed(kind, 1)
    assert len(left.arrays) == {"hessian": 4, "magnitudes": 3}[kind]
    whole = finished(left).merge(finished(right))  # type: ignore[arg-type]
    monkeypatch.setattr(statistics, "_kept", lambda arrays: arrays)
    on_device = [summed(kind, seed) for seed in (0, 1)]
    in_memory = [one.arrays for one in on_device]
    both = merged(*on_device)
    # As one that another worker has sent.
    again = merged(summed(kind, 0), in_numpy(right))
    for found in (merged(left, right), both, again):
        for name, value in fields(found).items():
            np.testing.assert_array_equal(value, getattr(whole, name))
    assert both.num_rows == 2 * 13
    assert all(isinstance(array, jax.Array) for array in both.arrays)
    assert all(array.is_deleted() for array in in_memory[0])
    assert not any(array.is_deleted() for array in in_memory[1])


def test_a_gram_in_bands_is_what_travels() -> None:
    total = in_numpy(summed("hessian", 0))
    assert all(isinstance(array, np.ndarray) for array in total.arrays)
    assert sum(array.nbytes for array in total.arrays) < 0.63 * 4 * SIZE**2
