"""float8 against E4M3 written out, and against what stock Keras computes at inference."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizer import Float8Scheme, MagnitudeSum, solve
from quantizer.rtn import float8_scale, round_to_float8
from tests import reference
from tests.quantizer.problems import PROBLEMS

SIZES = st.floats(0, 2.0**100, width=32)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_values_and_loss_match_the_float64_reference(problem, power_of_two):
    weight, inputs = PROBLEMS[problem].weight_RC, PROBLEMS[problem].inputs_NC
    solution = solve(weight, PROBLEMS[problem].magnitudes, Float8Scheme(power_of_two=power_of_two))
    answer = reference.float8(weight, power_of_two=power_of_two)
    restored, report = solution.weight.dequantize(), solution.report
    codes = restored / solution.weight.weight_scale
    assert np.mean(np.isclose(codes, answer.codes_RC, rtol=1e-5, atol=0)) >= 0.999
    # Magnitudes alone: inputs count as uncorrelated.
    diagonal = np.diag(np.diagonal(PROBLEMS[problem].true_hessian))
    error = reference.loss(weight, restored, diagonal)
    assert error == pytest.approx(reference.loss(weight, answer.restored_RC, diagonal), rel=1e-3)
    assert report.output_error == report.rtn_output_error == pytest.approx(error, rel=1e-3)
    assert report.weight_error == pytest.approx(
        reference.relative_weight_error(weight, restored), rel=1e-3
    )
    assert report.dead_inputs == np.sum(~inputs.any(0))
    assert solution.weight.input_amax == np.abs(inputs).max()
    assert solution.weight.weight_amax == np.abs(weight).max()


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=50))
def test_rounding_is_that_of_e4m3(values):
    rounded = round_to_float8(np.float32(values), np.float32(1))
    np.testing.assert_array_equal(rounded, reference.e4m3(np.float32(values)))


@given(SIZES)
def test_the_scale_maps_the_largest_value_onto_the_largest_code(amax):
    scale = float8_scale(amax, power_of_two=False)
    assert scale > 0
    if amax >= 1e-30:
        assert amax / scale == pytest.approx(448, rel=1e-6)
        assert round_to_float8(np.float32([amax]), scale)[0] == pytest.approx(amax, rel=1e-6)


@given(SIZES)
def test_a_power_of_two_is_the_least_that_clips_nothing(amax):
    scale = float8_scale(amax, power_of_two=True)
    assert np.frexp(scale)[0] == 0.5
    if amax >= 1e-30:
        assert 224 * (1 - 1e-6) <= amax / scale <= 448 * (1 + 1e-6)


def test_with_powers_of_two_the_weights_are_exact_in_bfloat16():
    problem = PROBLEMS["square"]
    solution = solve(problem.weight_RC, problem.magnitudes, Float8Scheme(power_of_two=True))
    value = solution.weight.dequantize()
    np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16).astype(np.float32), value)


def test_rounding_again_changes_nothing():
    # Keras rounds the stored kernel once more at every call.
    problem = PROBLEMS["square"]
    solution = solve(problem.weight_RC, problem.magnitudes, Float8Scheme())
    weight = solution.weight
    np.testing.assert_array_equal(
        round_to_float8(weight.value_RC, weight.weight_scale), weight.value_RC
    )


def test_a_weight_of_zeros_stays_zero():
    solution = solve(np.zeros((4, 8), np.float32), MagnitudeSum.of(np.ones((2, 8))), Float8Scheme())
    assert solution.weight.weight_scale == 1
    assert not solution.weight.dequantize().any()
    assert solution.report.weight_error == 0
