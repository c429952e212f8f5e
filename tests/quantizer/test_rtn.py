"""int8 and int4: Keras' own codes and scales, except where Keras corrupts the weight."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer import Int4Scheme, Int8Scheme, solve
from quantizer.rtn import round_channels, round_groups
from tests import reference
from tests.quantizer.problems import PROBLEMS


def weights_of(shape):
    elements = st.floats(-1000, 1000, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=elements)


WEIGHTS = weights_of(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20))
RANGES = {"int8": (-127, 127), "int4": (-8, 7)}


# Few shapes: Keras compiles anew for each.
SHAPES = st.sampled_from([(1, 1), (1, 20), (7, 5)])


@pytest.mark.parametrize("bits", RANGES)
@settings(max_examples=20)
@given(weight_RC=SHAPES.flatmap(weights_of))
def test_channels_are_keras_own_bit_for_bit(bits, weight_RC):
    low, high = RANGES[bits]
    ours = round_channels(weight_RC, low=low, high=high, scale_dtype="float32")
    for to_numpy in (False, True):
        codes_CR, scale_1R = keras.quantizers.abs_max_quantize(
            weight_RC.T, axis=0, value_range=(low, high), to_numpy=to_numpy
        )
        np.testing.assert_array_equal(ours.codes_RC, np.asarray(codes_CR).T)
        np.testing.assert_array_equal(ours.scale_R, np.asarray(scale_1R)[0])


def keras_groups(weight_RC, block_size):
    codes_CR, scale_GR, zero_GR = keras.quantizers.abs_max_quantize_grouped_with_zero_point(
        weight_RC.T, block_size=block_size, to_numpy=True
    )
    return np.asarray(codes_CR).T, np.asarray(scale_GR).T, np.asarray(zero_GR).T


def error_of(weight_RC, codes_RC, scale_RG, zero_RG, block_size):
    group_C = np.arange(weight_RC.shape[1]) // block_size
    restored_RC = (codes_RC - zero_RG[:, group_C].astype(np.float64)) * scale_RG[:, group_C]
    return np.square(weight_RC - restored_RC).sum(1)


@given(weight_RC=WEIGHTS, block_size=st.integers(1, 24))
def test_groups_that_span_zero_are_keras_own_bit_for_bit(weight_RC, block_size):
    for a in range(0, weight_RC.shape[1], block_size):
        weight_RC[:, a] = 0.0
    ours = round_groups(weight_RC, block_size=block_size, scale_dtype="float32")
    codes_RC, scale_RG, zero_RG = keras_groups(weight_RC, block_size)
    np.testing.assert_array_equal(ours.codes_RC, codes_RC)
    np.testing.assert_array_equal(ours.scale_RG, scale_RG)
    np.testing.assert_array_equal(ours.zero_RG, zero_RG)
    assert ours.zero_RG.dtype == zero_RG.dtype


@given(
    weight_RC=hnp.arrays(np.float32, (4, 24), elements=st.floats(np.float32(1.5), 2, width=32)),
    sign=st.sampled_from([-1, 1]),
)
def test_groups_that_do_not_span_zero_are_held_where_keras_corrupts_them(weight_RC, sign):
    weight_RC *= np.float32(sign)
    # Three blocks; at least two values in each, so that Keras' range is not a point.
    weight_RC[:, ::8], weight_RC[:, 1::8] = sign * 1.5, sign * 2
    ours = round_groups(weight_RC, block_size=8, scale_dtype="float32")
    theirs = keras_groups(weight_RC, 8)
    our_error = error_of(weight_RC, ours.codes_RC, ours.scale_RG, ours.zero_RG, 8)
    assert (our_error < error_of(weight_RC, *theirs, 8)).all()
    assert (np.abs(weight_RC - ours.dequantize()) <= ours.scale_RG.max() * 0.5001).all()


SCHEMES = {
    "int8": Int8Scheme(),
    "int4 per channel": Int4Scheme(block_size=-1),
    "int4 in groups": Int4Scheme(block_size=64),
}


def answer_of(weight_RC, scheme):
    if isinstance(scheme, Int8Scheme):
        return reference.int_channels(weight_RC, low=-127, high=127)
    if scheme.block_size == -1:
        return reference.int_channels(weight_RC, low=-8, high=7)
    return reference.int4_groups(weight_RC, block_size=scheme.block_size)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_codes_and_loss_match_the_float64_reference(problem, scheme):
    weight, hessian = PROBLEMS[problem].weight_RC, PROBLEMS[problem].true_hessian
    solution = solve(weight, PROBLEMS[problem].hessian, scheme)
    answer = answer_of(weight, scheme)
    restored, report = solution.weight.dequantize(), solution.report
    assert np.mean(solution.weight.codes_RC == answer.codes_RC) >= 0.999
    error = reference.loss(weight, restored, hessian)
    assert error == pytest.approx(reference.loss(weight, answer.restored_RC, hessian), rel=1e-3)
    assert report.output_error == pytest.approx(error, rel=1e-3)
    assert report.rtn_output_error == report.output_error
    assert report.weight_error == pytest.approx(
        reference.relative_weight_error(weight, restored), rel=1e-3
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_magnitudes_judge_by_the_diagonal_and_nothing_by_nothing(scheme):
    problem = PROBLEMS["tall"]
    judged = solve(problem.weight_RC, problem.magnitudes, scheme)
    diagonal = np.diag(np.diagonal(problem.true_hessian))
    assert judged.report.output_error == pytest.approx(
        reference.loss(problem.weight_RC, judged.weight.dequantize(), diagonal), rel=1e-3
    )
    blind = solve(problem.weight_RC, None, scheme)
    np.testing.assert_array_equal(blind.weight.codes_RC, judged.weight.codes_RC)
    assert blind.report.output_error is None
    assert blind.report.num_rows == 0


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_output_channels_are_solved_apart(scheme):
    weight = PROBLEMS["tall"].weight_RC
    whole = solve(weight, None, scheme).weight
    part = solve(weight[10:50], None, scheme).weight
    np.testing.assert_array_equal(part.codes_RC, whole.codes_RC[10:50])
    np.testing.assert_array_equal(part.dequantize(), whole.dequantize()[10:50])


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_narrow_scales_hold_zero_and_tiny_channels(scheme, scale_dtype):
    weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    weight *= np.float32([[0], [1e-30], [1e-9], [1e-4], [1], [100]])
    solved = solve(weight, None, scheme, scale_dtype=scale_dtype).weight
    restored = solved.dequantize()
    assert np.isfinite(restored).all()
    scale = solved.scale_R if hasattr(solved, "scale_R") else solved.scale_RG
    np.testing.assert_array_equal(scale, reference.stored(scale, scale_dtype))
    steps = 127 if scheme.mode == "int8" else 7
    half_a_step = 0.6 * np.ptp(weight, axis=1, keepdims=True) / steps
    # A step finer than 1/65504 has no inverse in float16.
    assert (np.abs(weight - restored) <= half_a_step + 0.5 / 65504).all()


def test_a_block_larger_than_the_layer_is_one_group():
    weight = PROBLEMS["tall"].weight_RC
    one = solve(weight, None, Int4Scheme(block_size=64)).weight
    huge = solve(weight, None, Int4Scheme(block_size=10**9)).weight
    np.testing.assert_array_equal(one.codes_RC, huge.codes_RC)
    np.testing.assert_array_equal(one.scale_RG, huge.scale_RG)
