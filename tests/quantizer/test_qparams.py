"""Grids hold every weight of their range to half a step, and zero exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer.qparams import decode, encode, find_grid, num_groups
from tests import reference
from tests.selection import by_default

IN_FEATURES, OUT_FEATURES = 20, 3
# One compiled program each; groups of 8 leave a short last one.
GRIDS = [
    {"weight_bits": bits, "group_size": size, "symmetric": symmetric, "search": search}
    for bits, size, symmetric, search in [
        (2, 8, False, True),
        (3, -1, True, True),
        (4, 8, False, False),
        (4, 20, True, False),
        (8, 1, False, True),
        (8, 8, True, False),
    ]
]
WEIGHTS = hnp.arrays(
    np.float32,
    (IN_FEATURES, OUT_FEATURES),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


def grid_of(weight_CR, options, scale_dtype="float32"):
    energy_C1 = np.linspace(0.1, 3, len(weight_CR), dtype=np.float32)[:, None]
    found = find_grid(
        jnp.asarray(weight_CR), jnp.asarray(energy_C1), **options, scale_dtype=scale_dtype
    )
    return tuple(np.asarray(array) for array in found)


def on_grid(weight_CR, scale_GR, zero_GR, options):
    """Scale, zero point, codes and restored weights, one row per input."""
    size = len(weight_CR) if options["group_size"] == -1 else options["group_size"]
    group_C = np.arange(len(weight_CR)) // size
    scale_CR, zero_CR = scale_GR[group_C], zero_GR[group_C]
    codes_CR = encode(weight_CR, scale_CR, zero_CR, 2.0 ** options["weight_bits"] - 1)
    return scale_CR, zero_CR, np.asarray(codes_CR), np.asarray(decode(codes_CR, scale_CR, zero_CR))


def assert_holds(weight_CR, scale_GR, zero_GR, options):
    top = 2 ** options["weight_bits"] - 1
    assert np.isfinite(scale_GR).all()
    assert (scale_GR > 0).all()
    assert ((zero_GR >= 0) & (zero_GR <= top) & (zero_GR == np.round(zero_GR))).all()
    scale, zero, codes, restored = on_grid(weight_CR, scale_GR, zero_GR, options)
    assert ((codes >= 0) & (codes <= top) & (codes == np.round(codes))).all()
    low, high = (0 - zero) * scale, (top - zero) * scale
    within = (weight_CR >= low) & (weight_CR <= high)
    slack = 1e-5 * np.maximum(np.abs(weight_CR), scale)
    assert (np.abs(weight_CR - restored) <= scale / 2 + slack)[within].all()
    clipped = np.clip(weight_CR, low, high)
    np.testing.assert_allclose(restored[~within], clipped[~within], rtol=1e-6)
    np.testing.assert_array_equal(
        on_grid(np.zeros_like(weight_CR), scale_GR, zero_GR, options)[3], 0
    )


@pytest.mark.parametrize(
    "scale_dtype", by_default(["float32", "bfloat16", "float16"], ["bfloat16"])
)
@pytest.mark.parametrize("options", GRIDS, ids=str)
@settings(max_examples=25)
@given(weight_CR=WEIGHTS)
def test_weights_are_held_to_half_a_step(options, scale_dtype, weight_CR):
    scale_GR, zero_GR = grid_of(weight_CR, options, scale_dtype)
    np.testing.assert_array_equal(scale_GR, reference.stored(scale_GR, scale_dtype))
    assert_holds(weight_CR, scale_GR, zero_GR, options)


@pytest.mark.parametrize("options", [o for o in GRIDS if not o["search"]], ids=str)
@settings(max_examples=25)
@given(weight_CR=WEIGHTS)
def test_without_search_no_weight_is_clipped_by_more_than_half_a_step(options, weight_CR):
    scale_GR, zero_GR = grid_of(weight_CR, options)
    scale, _, _, restored = on_grid(weight_CR, scale_GR, zero_GR, options)
    # Weights that the smallest normal scale cannot tell from 0 count as 0.
    assert (np.abs(weight_CR - restored) <= scale / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("options", [o for o in GRIDS if o["search"]], ids=str)
@settings(max_examples=25)
@given(weight_CR=WEIGHTS)
def test_the_search_never_costs_more_than_the_full_range(options, weight_CR):
    energy_C1 = np.linspace(0.1, 3, IN_FEATURES, dtype=np.float32)[:, None]

    def cost(search):
        chosen = {**options, "search": search}
        restored = on_grid(weight_CR, *grid_of(weight_CR, chosen), chosen)[3]
        return np.sum(energy_C1 * (weight_CR - restored) ** 2.0)

    assert cost(True) <= cost(False) * (1 + 1e-4) + 1e-12


GROUPS = {
    "all positive": np.linspace(3, 4, IN_FEATURES),
    "all negative": np.linspace(-4, -3, IN_FEATURES),
    "constant": np.full(IN_FEATURES, 0.7),
    "all zero": np.zeros(IN_FEATURES),
    "one weight": np.eye(IN_FEATURES)[4] * -2,
    "tiny": np.linspace(-1e-30, 1e-30, IN_FEATURES),
    "subnormal": np.full(IN_FEATURES, 1e-40),
    "huge": np.linspace(-1e8, 1e4, IN_FEATURES),
}


@pytest.mark.parametrize("options", GRIDS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_groups_that_do_not_span_zero_are_held_too(options, group):
    weight_CR = np.repeat(GROUPS[group][:, None], OUT_FEATURES, axis=1).astype(np.float32)
    assert_holds(weight_CR, *grid_of(weight_CR, options), options)


def test_a_one_sided_range_starts_at_zero():
    weight_CR = np.full((IN_FEATURES, OUT_FEATURES), 3.0, np.float32)
    scale_GR, zero_GR = grid_of(weight_CR, GRIDS[2])
    np.testing.assert_array_equal(zero_GR, 0)
    np.testing.assert_allclose(scale_GR, 3 / 15, rtol=1e-6)
    scale_GR, zero_GR = grid_of(-weight_CR, GRIDS[2])
    np.testing.assert_array_equal(zero_GR, 15)


def test_the_symmetric_zero_point_is_the_middle_code():
    weight_CR = np.full((IN_FEATURES, OUT_FEATURES), 3.0, np.float32)
    for options in GRIDS:
        if options["symmetric"]:
            _, zero_GR = grid_of(weight_CR, options)
            np.testing.assert_array_equal(zero_GR, 2 ** (options["weight_bits"] - 1))


# A group of one weight has many scales that hold it exactly: nothing to compare.
@pytest.mark.parametrize("options", [o for o in GRIDS if o["group_size"] != 1], ids=str)
def test_grids_are_those_of_the_float64_reference(options):
    weight_RC = np.random.default_rng(1).standard_normal((OUT_FEATURES, IN_FEATURES))
    weight_RC = weight_RC.astype(np.float32)
    energy_C = np.linspace(0.1, 3, IN_FEATURES, dtype=np.float32)
    scale_GR, zero_GR = grid_of(weight_RC.T, options)
    scale_RC, zero_RC = reference.grid(
        weight_RC.astype(np.float64), energy_C.astype(np.float64), **options
    )
    scale_CR, zero_CR, _, _ = on_grid(weight_RC.T, scale_GR, zero_GR, options)
    np.testing.assert_allclose(scale_CR.T, scale_RC, rtol=1e-6)
    np.testing.assert_array_equal(zero_CR.T, zero_RC)


@pytest.mark.parametrize(
    ("in_features", "group_size", "count"),
    [(128, 64, 2), (129, 64, 3), (64, 64, 1), (5, -1, 1), (7, 1, 7)],
)
def test_the_last_group_may_be_short(in_features, group_size, count):
    assert num_groups(in_features, group_size) == count


@pytest.mark.parametrize("size", [1e-7, 1e-6])
def test_weights_too_small_for_a_stored_step_are_not_lost(size):
    weight = np.float32(size) * np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    options = {"weight_bits": 8, "group_size": 20, "symmetric": False, "search": True}
    scale_GR, zero_GR = grid_of(weight, options, "float16")
    *_, restored = on_grid(weight, scale_GR, zero_GR, options)
    # A step of 1 would round all of them to zero.
    assert np.linalg.norm(weight - restored) < 0.5 * np.linalg.norm(weight)
