"""Bad input is refused with the layer's name and what to do; nothing turns into NaN."""

import dataclasses

import numpy as np
import pytest

from quantizer import (
    AWQScheme,
    CalibrationError,
    DriftSum,
    Float8Scheme,
    GPTQScheme,
    HessianSum,
    Int4Scheme,
    Int8Scheme,
    MagnitudeSum,
    SchemeError,
    WeightError,
    solve,
    solve_stack,
)

NAME = "transformer_block_3/query"
IN_FEATURES, OUT_FEATURES, NUM_ROWS = 32, 8, 64
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((OUT_FEATURES, IN_FEATURES)).astype(np.float32)
INPUTS = RNG.standard_normal((NUM_ROWS, IN_FEATURES)).astype(np.float32)
HESSIAN, MAGNITUDES = HessianSum.of(INPUTS), MagnitudeSum.of(INPUTS)
GPTQ = GPTQScheme(group_size=16)
SCHEMES = {
    "gptq": (GPTQ, HESSIAN),
    "awq": (AWQScheme(group_size=16, num_grid_points=3), HESSIAN),
    "awq by magnitudes": (AWQScheme(group_size=16, num_grid_points=3), MAGNITUDES),
    "int8": (Int8Scheme(), None),
    "int4": (Int4Scheme(block_size=16), None),
    "int4 per channel": (Int4Scheme(block_size=-1), None),
    "float8": (Float8Scheme(), MAGNITUDES),
    "float8 by powers of two": (Float8Scheme(power_of_two=True), MAGNITUDES),
}
every_scheme = pytest.mark.parametrize(
    ("scheme", "statistics"), SCHEMES.values(), ids=list(SCHEMES)
)


def with_value(array, value):
    changed = array.copy()
    changed.flat[3] = value
    return changed


def assert_refused(error, message, weight, statistics, scheme, **options):
    with pytest.raises(error, match=message) as caught:
        solve(weight, statistics, scheme, name=NAME, **options)
    assert NAME in str(caught.value)


def assert_finite(solution):
    assert np.isfinite(solution.weight.dequantize()).all()
    report = solution.report
    for value in (report.weight_error, report.output_error, report.rtn_output_error):
        assert value is None or np.isfinite(value)


BAD_WEIGHTS = {
    "NaN": (with_value(WEIGHT, np.nan), "1 of 256 weights are NaN or infinite"),
    "infinity": (with_value(WEIGHT, np.inf), "checkpoint is damaged"),
    "float64 beyond float32": (with_value(WEIGHT.astype(np.float64), 1e300), "too narrow a dtype"),
    "1-D": (WEIGHT[0], r"shape \[out_features, in_features\], got \(32,\)"),
    "3-D": (WEIGHT[None], "got"),
    "no outputs": (WEIGHT[:0], "got"),
    "no inputs": (WEIGHT[:, :0], "got"),
    "a number": (np.float32(1), "got"),
    "integers": (np.ones((8, 32), np.int8), "int8.*already quantized"),
    "booleans": (np.ones((8, 32), bool), "bool"),
    "complex numbers": (WEIGHT.astype(np.complex64), "complex64"),
    "text": (np.full((8, 32), "0.5"), "float"),
    "ragged rows": ([[0.5, 1.0], [0.5]], "float"),
    "too large to square": (WEIGHT * np.float32(1e30), "largest"),
}


@pytest.mark.parametrize(("weight", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_weight_that_cannot_be_quantized_is_refused(weight, message):
    assert_refused(WeightError, message, weight, HESSIAN, GPTQ)


@every_scheme
def test_every_scheme_refuses_a_bad_weight(scheme, statistics):
    assert_refused(WeightError, *reversed(BAD_WEIGHTS["NaN"]), statistics, scheme)


def test_a_stack_names_the_layer_at_fault():
    with pytest.raises(WeightError, match=r"^key: 1 of 256"):
        solve_stack([WEIGHT, with_value(WEIGHT, np.nan)], HESSIAN, GPTQ, names=["query", "key"])
    with pytest.raises(CalibrationError, match=r"^value: .*16 input features"):
        solve_stack([WEIGHT, WEIGHT[:, :16]], HESSIAN, GPTQ, names=["query", "value"])
    with pytest.raises(SchemeError, match=r"^weight 0: group_size 33"):
        solve_stack([WEIGHT], HESSIAN, GPTQScheme(group_size=33))
    with pytest.raises(CalibrationError, match=r"^query: .*a HessianSum"):
        solve_stack([WEIGHT], MAGNITUDES, GPTQ, names=["query"])
    with pytest.raises(CalibrationError, match=r"^query: .*no DriftSum"):
        solve_stack(
            [WEIGHT], HESSIAN, GPTQScheme(group_size=16, drift_correction=1), names=["query"]
        )
    with pytest.raises(CalibrationError, match=r"^query: .*a MagnitudeSum"):
        solve_stack([WEIGHT], HESSIAN, Float8Scheme(), names=["query"])


def hessian_with(value, place=(0, 0)):
    gram = HESSIAN.gram_CC.copy()
    gram[place] = value
    return HessianSum(gram, NUM_ROWS)


BAD_HESSIANS = {
    "missing": (
        None,
        "gptq takes a HessianSum of the layer's inputs, got NoneType.*int8 needs no calibration",
    ),
    "magnitudes": (MAGNITUDES, "takes a HessianSum.*got MagnitudeSum"),
    "an array": (HESSIAN.gram_CC, "takes a HessianSum.*got ndarray"),
    "NaN": (hessian_with(np.nan, (2, 3)), "Hessian contains NaN.*wider dtype"),
    "infinity": (hessian_with(np.inf), "Hessian contains NaN or infinity"),
    "negative diagonal": (hessian_with(-1.0), r"negative diagonal.*HessianSum\.of"),
    "all zero": (HessianSum.of(0 * INPUTS), "every calibration input.*padding mask"),
    "no rows": (HessianSum.of(INPUTS[:0]), "no calibration row.*num_samples"),
    "everything masked": (HessianSum.of(INPUTS, np.zeros(NUM_ROWS)), "no calibration row"),
    "negative rows": (HessianSum(HESSIAN.gram_CC, -3), "no calibration row"),
    "other inputs": (HessianSum.of(INPUTS[:, :16]), "weight has 32 input features"),
    "not square": (HessianSum(HESSIAN.gram_CC[:16], NUM_ROWS), "expected"),
    "one number": (HessianSum(np.float32(1).reshape(()), NUM_ROWS), "expected"),
    "too large": (HessianSum(HESSIAN.gram_CC * np.float32(1e36), 1), "largest"),
}


@pytest.mark.parametrize(("statistics", "message"), BAD_HESSIANS.values(), ids=BAD_HESSIANS)
def test_a_hessian_that_cannot_serve_is_refused(statistics, message):
    assert_refused(CalibrationError, message, WEIGHT, statistics, GPTQ)


def magnitudes_with(**fields):
    return dataclasses.replace(MAGNITUDES, **fields)


BAD_MAGNITUDES = {
    "missing": (None, "takes a .*MagnitudeSum.*got NoneType.*int8 needs no calibration"),
    "an array": (MAGNITUDES.max_abs_C, "takes a .*MagnitudeSum.*got ndarray"),
    "a drift": (DriftSum.of(INPUTS, INPUTS), "takes a .*MagnitudeSum.*got DriftSum"),
    "NaN": (magnitudes_with(sum_abs_C=with_value(MAGNITUDES.sum_abs_C, np.nan)), "contain NaN"),
    "infinity": (
        magnitudes_with(max_abs_C=with_value(MAGNITUDES.max_abs_C, np.inf)),
        "wider dtype",
    ),
    "all zero": (MagnitudeSum.of(0 * INPUTS), "every calibration input"),
    "no rows": (MagnitudeSum.of(INPUTS[:0]), "no calibration row"),
    "everything masked": (MagnitudeSum.of(INPUTS, np.zeros(NUM_ROWS)), "no calibration row"),
    "negative rows": (magnitudes_with(num_rows=-1), "no calibration row"),
    "other inputs": (MagnitudeSum.of(INPUTS[:, :16]), "weight has 32 input features"),
    "uneven sums": (magnitudes_with(sum_square_C=MAGNITUDES.sum_square_C[:4]), "shape"),
    "negative": (magnitudes_with(sum_square_C=-MAGNITUDES.sum_square_C), "negative"),
}


@pytest.mark.parametrize(("statistics", "message"), BAD_MAGNITUDES.values(), ids=BAD_MAGNITUDES)
def test_magnitudes_that_cannot_serve_are_refused(statistics, message):
    assert_refused(CalibrationError, message, WEIGHT, statistics, SCHEMES["awq"][0])


@pytest.mark.parametrize("kind", ["missing", "a drift", "NaN"])
def test_float8_refuses_them_too(kind):
    statistics, message = BAD_MAGNITUDES[kind]
    assert_refused(CalibrationError, message, WEIGHT, statistics, Float8Scheme())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_even_unneeded_statistics_must_be_sound(scheme):
    statistics, message = BAD_MAGNITUDES["NaN"]
    assert_refused(CalibrationError, message, WEIGHT, statistics, SCHEMES[scheme][0])
    message = "HessianSum, a MagnitudeSum or None of the layer's inputs, got ndarray"
    assert_refused(CalibrationError, message, WEIGHT, HESSIAN.gram_CC, SCHEMES[scheme][0])


def test_float8_says_what_a_hessian_lacks():
    message = r"takes a MagnitudeSum \(a HessianSum lacks the largest input\).*got HessianSum"
    assert_refused(CalibrationError, message, WEIGHT, HESSIAN, Float8Scheme())


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_refused(kind, value):
    with pytest.raises(CalibrationError, match="NaN or infinity; check the model's own outputs"):
        kind.of(with_value(INPUTS, value))


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
def test_inputs_of_the_wrong_shape_are_refused(kind):
    with pytest.raises(
        CalibrationError, match=r"must be \[\.\.\., in_features\], got shape \(32,\)"
    ):
        kind.of(INPUTS[0])
    with pytest.raises(CalibrationError, match="mask has 3 entries for 64 rows"):
        kind.of(INPUTS, [True, False, True])


@pytest.mark.parametrize("kind", [HessianSum, MagnitudeSum])
def test_inputs_too_large_to_square_are_refused(kind):
    with pytest.raises(CalibrationError, match="too large"):
        kind.of(INPUTS * np.float32(1e25))


def test_drifts_of_bad_inputs_are_refused():
    with pytest.raises(CalibrationError, match="share one shape"):
        DriftSum.of(INPUTS, INPUTS[:3])
    with pytest.raises(CalibrationError, match="share one shape"):
        DriftSum.of(INPUTS[0], INPUTS[0])
    for exact, seen in [(with_value(INPUTS, np.nan), INPUTS), (INPUTS, with_value(INPUTS, np.inf))]:
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            DriftSum.of(exact, seen)


@pytest.mark.parametrize("scheme", [GPTQScheme(group_size=33), AWQScheme(group_size=128)], ids=str)
def test_a_group_larger_than_the_layer_is_refused(scheme):
    message = f"group_size {scheme.group_size} is larger than the layer's 32.*at most 32, or -1"
    assert_refused(SchemeError, message, WEIGHT, HESSIAN, scheme)


@pytest.mark.parametrize("scale_dtype", ["float64", "float8", "int8", "", None])
def test_an_unknown_scale_dtype_names_those_there_are(scale_dtype):
    message = "float32, bfloat16 or float16"
    assert_refused(SchemeError, message, WEIGHT, HESSIAN, GPTQ, scale_dtype=scale_dtype)


@pytest.mark.parametrize("scheme", ["gptq", None, GPTQScheme, {"mode": "gptq"}], ids=str)
def test_what_is_no_scheme_is_refused(scheme):
    assert_refused(SchemeError, "scheme", WEIGHT, HESSIAN, scheme)


SIZES = [0, 1e-45, 1e-40, 1e-30, 1e-12, 1e-6, 1, 1e4]


def assert_held(weight, statistics, scheme, scale_dtype):
    result = solve(weight, statistics, scheme, scale_dtype=scale_dtype, name=NAME)
    assert_finite(result)
    largest_R = np.abs(result.weight.dequantize()).max(1)
    assert (largest_R <= 1.1 * np.abs(weight).max() + 1e-7).all()
    return largest_R


@every_scheme
@pytest.mark.parametrize("size", [0, 1e-40, 1e4])
def test_weights_of_any_sound_size_are_solved_without_nan(scheme, statistics, size):
    # float16 has the narrowest range for scales.
    assert_held(WEIGHT * np.float32(size), statistics, scheme, "float16")


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gptq", "int8", "int4", "int4 per channel"])
def test_output_channels_of_any_size_are_solved_without_nan(name, scale_dtype):
    # These find each channel's scale from it alone: one weight holds all sizes.
    weight = WEIGHT * np.float32(SIZES)[:, None]
    scheme, statistics = SCHEMES[name]
    largest_R = assert_held(weight, statistics, scheme, scale_dtype)
    assert (largest_R <= 1.1 * np.abs(weight).max(1) + 1e-7).all()


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-12, 1e-6])
@pytest.mark.parametrize("name", ["awq", "awq by magnitudes", "float8", "float8 by powers of two"])
def test_whole_weights_of_any_size_are_solved_without_nan(name, size):
    # These choose something for all channels together.
    scheme, statistics = SCHEMES[name]
    for scale_dtype in ("float32", "bfloat16", "float16") if scheme.mode == "awq" else ["float32"]:
        assert_held(WEIGHT * np.float32(size), statistics, scheme, scale_dtype)


@every_scheme
def test_weights_beyond_float16_scales_are_refused(scheme, statistics):
    weight = WEIGHT * np.float32(1e6)
    if isinstance(scheme, Float8Scheme):
        assert_finite(solve(weight, statistics, scheme, scale_dtype="float16"))
    else:
        assert_refused(
            WeightError, "float16.*bfloat16", weight, statistics, scheme, scale_dtype="float16"
        )


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e3, 1e7])
@pytest.mark.parametrize("name", [name for name, (_, known) in SCHEMES.items() if known])
def test_inputs_of_any_sound_size_are_solved_without_nan(name, size):
    scheme, statistics = SCHEMES[name]
    statistics = type(statistics).of(INPUTS * np.float32(size))
    assert_finite(solve(WEIGHT, statistics, scheme, name=NAME))


@every_scheme
def test_one_weight_is_enough(scheme, statistics):
    if statistics is not None:
        statistics = type(statistics).of(INPUTS[:, :1])
    options = {"group_size": 1} if hasattr(scheme, "group_size") else {}
    solution = solve(WEIGHT[:1, :1], statistics, dataclasses.replace(scheme, **options))
    assert_finite(solution)
    assert solution.weight.dequantize() == pytest.approx(WEIGHT[:1, :1], rel=0.1)


def test_inputs_are_left_alone():
    weight, gram = WEIGHT.copy(), HESSIAN.gram_CC.copy()
    weight.flags.writeable = gram.flags.writeable = False
    solve(weight, HessianSum(gram, NUM_ROWS), GPTQ)
    np.testing.assert_array_equal(weight, WEIGHT)
