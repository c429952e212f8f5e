"""Calibration sums: raw, mergeable, and the same bits whatever arrives first."""

import random

import ml_dtypes
import numpy as np
import pytest

from quantizer import CalibrationError, DriftSum, HessianSum, MagnitudeSum, tree_merge

ROWS = np.random.default_rng(0).standard_normal((200, 24)).astype(np.float32)
DRIFTED = ROWS + 0.1 * np.random.default_rng(1).standard_normal(ROWS.shape).astype(np.float32)
# Uneven shards: means of them would weigh 30 rows like 170.
SHARDS = [slice(0, 30), slice(30, 200)]


def drift_of(rows):
    return DriftSum.of(ROWS[rows], DRIFTED[rows])


OF = {
    "hessian": lambda rows: HessianSum.of(ROWS[rows]),
    "magnitude": lambda rows: MagnitudeSum.of(ROWS[rows]),
    "drift": drift_of,
}


def arrays_of(total):
    return [getattr(total, field) for field in total.__slots__ if field != "num_rows"]


def test_sums_are_raw():
    exact = ROWS.astype(np.float64)
    np.testing.assert_allclose(HessianSum.of(ROWS).gram_CC, exact.T @ exact, rtol=1e-4, atol=1e-4)
    magnitudes = MagnitudeSum.of(ROWS)
    np.testing.assert_allclose(magnitudes.sum_abs_C, np.abs(exact).sum(0), rtol=1e-5)
    np.testing.assert_allclose(magnitudes.sum_square_C, np.square(exact).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(magnitudes.max_abs_C, np.abs(ROWS).max(0))
    cross = (exact - DRIFTED).T @ DRIFTED.astype(np.float64)
    np.testing.assert_allclose(drift_of(slice(None)).cross_CC, cross, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", OF)
def test_uneven_shards_merge_to_the_whole(kind):
    whole = OF[kind](slice(None))
    merged = tree_merge([OF[kind](shard) for shard in SHARDS], lambda a, b: a.merge(b))
    assert merged.num_rows == whole.num_rows == 200
    for ours, theirs in zip(arrays_of(merged), arrays_of(whole), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", OF)
def test_arrival_order_does_not_change_a_bit(kind):
    leaves = [OF[kind](slice(a, a + 17)) for a in range(0, 200, 17)]

    def reduce_as_they_come(seed):
        arrivals = list(enumerate(leaves))
        random.Random(seed).shuffle(arrivals)
        places = [None] * len(leaves)
        for index, leaf in arrivals:
            places[index] = leaf
        return tree_merge(places, lambda a, b: a.merge(b))

    first = reduce_as_they_come(0)
    for seed in range(1, 5):
        again = reduce_as_they_come(seed)
        assert again.num_rows == first.num_rows
        for ours, theirs in zip(arrays_of(again), arrays_of(first), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("count", "tree"),
    [
        (1, "a"),
        (2, "(ab)"),
        (3, "((ab)c)"),
        (5, "(((ab)(cd))e)"),
        (7, "(((ab)(cd))((ef)g))"),
        (8, "(((ab)(cd))((ef)(gh)))"),
    ],
)
def test_the_tree_depends_on_the_count_alone(count, tree):
    assert tree_merge(list("abcdefgh"[:count]), lambda a, b: f"({a}{b})") == tree


def test_the_leaves_are_left_alone():
    leaves = [HessianSum.of(ROWS[shard]) for shard in SHARDS]
    before = [leaf.gram_CC.copy() for leaf in leaves]
    given = list(leaves)
    tree_merge(given, HessianSum.merge)
    assert given == leaves
    for leaf, gram in zip(leaves, before, strict=True):
        np.testing.assert_array_equal(leaf.gram_CC, gram)


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
def test_masked_rows_do_not_count(kind):
    mask = np.arange(200) % 3 > 0
    batched, batched_mask = ROWS.reshape(4, 50, 24), mask.reshape(4, 50)
    masked = kind.of(batched, batched_mask)
    chosen = kind.of(ROWS[mask])
    assert masked.num_rows == chosen.num_rows == mask.sum()
    for ours, theirs in zip(arrays_of(masked), arrays_of(chosen), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
def test_what_the_mask_hides_may_be_anything(kind):
    rows = ROWS.copy()
    rows[0] = np.nan
    assert np.isfinite(arrays_of(kind.of(rows, np.arange(200) > 0))[0]).all()


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
def test_a_shard_of_padding_merges_as_nothing(kind):
    nothing = kind.of(ROWS, np.zeros(200, bool))
    assert nothing.num_rows == 0
    whole = kind.of(ROWS)
    for ours, theirs in zip(arrays_of(whole.merge(nothing)), arrays_of(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "bfloat16"])
def test_inputs_of_any_float_dtype_are_summed_in_float32(dtype):
    rows = ROWS.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    total = HessianSum.of(rows)
    assert total.gram_CC.dtype == np.float32
    np.testing.assert_array_equal(total.gram_CC, HessianSum.of(rows.astype(np.float32)).gram_CC)


def test_half_precision_inputs_do_not_overflow_the_sum():
    rows = np.full((100, 4), 6e4, np.float16)
    assert np.isfinite(HessianSum.of(rows).gram_CC).all()


@pytest.mark.parametrize("kind", OF)
def test_sums_over_other_inputs_do_not_merge(kind):
    narrow = {
        "hessian": lambda: HessianSum.of(ROWS[:, :8]),
        "magnitude": lambda: MagnitudeSum.of(ROWS[:, :8]),
        "drift": lambda: DriftSum.of(ROWS[:, :8], DRIFTED[:, :8]),
    }[kind]()
    with pytest.raises(CalibrationError, match="24 and 8 input features"):
        OF[kind](slice(None)).merge(narrow)


def test_no_shard_at_all_is_an_error():
    with pytest.raises(CalibrationError, match="at least one"):
        tree_merge([], HessianSum.merge)
