"""Large matrices by stripes: what NumPy gives for the whole, bit for bit."""

import threading

import numpy as np
import pytest

from quantizer import row_stripes
from quantizer.keras_format.layers import solve_embedding
from quantizer.row_stripes import by_rows, sum_of_squares
from quantizer.rtn import round_channels, round_groups
from quantizer.schemes import Int4Scheme, Int8Scheme

SHAPES = [(1, 1), (3, 7), (129, 31), (1000, 77), (5, 4099), (2048, 64)]


def random(shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.fixture
def small_stripes(monkeypatch):
    """Small matrices are cut, too."""
    monkeypatch.setattr(row_stripes, "_STRIPE", 1 << 10)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_by_stripes_has_the_bits_of_numpys(small_stripes, shape, order):
    value = np.asarray(random(shape), order=order)
    other = value + np.float32(0.01) * random(shape)
    assert sum_of_squares(value) == np.sum(np.square(value, dtype=np.float64))
    assert sum_of_squares(value, other) == np.sum(np.square(value - other, dtype=np.float64))


def test_stripes_are_done_by_several_threads_each_once(small_stripes, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    done, together = [], threading.Barrier(3, timeout=20)

    def work(rows):
        done.append(rows)
        if rows.stop <= 48:
            together.wait()  # for two others, which only other threads can be at

    by_rows(work, (100, 64))
    assert sorted(row for rows in done for row in range(100)[rows]) == list(range(100))


@pytest.mark.parametrize("order", ["C", "F"])
def test_rounding_by_stripes_is_rounding_of_the_whole(monkeypatch, order):
    weight_RC = np.asarray(random((300, 40)), order=order)

    def rounded():
        channels = round_channels(weight_RC, low=-127, high=127, scale_dtype="bfloat16")
        groups = round_groups(weight_RC, block_size=16, scale_dtype="float16")
        arrays = channels.codes_RC, channels.scale_R, groups.codes_RC, groups.scale_RG
        return *arrays, groups.zero_RG, channels.dequantize(), groups.dequantize()

    whole = rounded()
    monkeypatch.setattr(row_stripes, "_STRIPE", 1 << 10)
    for part, one in zip(rounded(), whole, strict=True):
        assert part.dtype == one.dtype
        np.testing.assert_array_equal(part, one)


@pytest.mark.parametrize("scheme", [Int8Scheme(), Int4Scheme(block_size=16)])
def test_a_table_has_the_same_variables_and_error_in_stripes(monkeypatch, scheme):
    def solved():
        table = random((300, 32))
        return solve_embedding(table, table.T, scheme, scale_dtype="float32", name="table")

    variables, report = solved()
    monkeypatch.setattr(row_stripes, "_STRIPE", 1 << 10)
    in_stripes, report_in_stripes = solved()
    assert report_in_stripes == report
    assert in_stripes.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(in_stripes[name], array)
