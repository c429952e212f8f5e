"""Drift correction: the least-squares target, and a better answer on what the layer sees."""

import numpy as np
import pytest

from quantizer import CalibrationError, DriftSum, GPTQScheme, HessianSum, solve, solve_stack
from quantizer.gptq.drift import HeldBackSums, JudgedDrift, correct_target
from quantizer.gptq.solved_rows import join_slices
from quantizer.solver import check_layer, solve_rows
from tests import reference
from tests.quantizer.problems import make
from tests.selection import by_default, covering

PROBLEM = make(48, 96, 1024)
EXACT = PROBLEM.inputs_NC
# Earlier layers shrank and blurred the inputs, as rounded weights do.
NOISE = np.random.default_rng(3).standard_normal(EXACT.shape).astype(np.float32)
SEEN = (0.9 * EXACT + 0.15 * EXACT.std(0) * NOISE).astype(np.float32)
HESSIAN = HessianSum.of(SEEN)
DRIFT = DriftSum.of(EXACT, SEEN)


def answer_error(target_RC, restored_RC, seen=SEEN, exact=EXACT):
    """‖x Wᵀ - x̃ Ŵᵀ‖², float64."""
    wanted = exact.astype(np.float64) @ target_RC.T.astype(np.float64)
    return float(np.square(wanted - seen.astype(np.float64) @ restored_RC.T).sum())


def judged(held_exact, held_seen, fitted=slice(0, 700)):
    """The drift of some rows, judged on others; and the Hessian of all."""
    held_back = HeldBackSums.of(held_exact, held_seen)
    hessian = HessianSum.of(SEEN[fitted])
    drift = JudgedDrift(hessian, DriftSum.of(EXACT[fitted], SEEN[fitted]), held_back)
    return drift, hessian.merge(held_back.hessian)


HELD = slice(700, 1024)
JUDGED, ALL_ROWS = judged(EXACT[HELD], SEEN[HELD])


def corrected(strength, hessian_damping=0.01):
    return correct_target(
        PROBLEM.weight_RC, HESSIAN, DRIFT, strength=strength, hessian_damping=hessian_damping
    )


@pytest.mark.parametrize(("strength", "hessian_damping"), covering([0.25, 1.0], [0.0, 0.01, 0.1]))
def test_the_target_is_the_damped_least_squares_one(strength, hessian_damping):
    wanted = reference.drift_target(
        PROBLEM.weight_RC, EXACT, SEEN, strength=strength, hessian_damping=hessian_damping
    )
    ours = corrected(strength, hessian_damping)
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - wanted) <= 1e-4 * np.linalg.norm(wanted - PROBLEM.weight_RC)


def test_undamped_no_weights_answer_better():
    best = answer_error(PROBLEM.weight_RC, corrected(1.0, 0.0))
    free_CR = np.linalg.lstsq(
        SEEN.astype(np.float64), EXACT.astype(np.float64) @ PROBLEM.weight_RC.T, rcond=None
    )[0]
    assert best == pytest.approx(answer_error(PROBLEM.weight_RC, free_CR.T), rel=1e-4)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2):
        step = size * rng.standard_normal(PROBLEM.weight_RC.shape)
        assert answer_error(PROBLEM.weight_RC, corrected(1.0, 0.0) + step) > best


def test_strength_goes_from_the_weight_to_the_target():
    np.testing.assert_array_equal(corrected(0.0), PROBLEM.weight_RC)
    errors = [answer_error(PROBLEM.weight_RC, corrected(s)) for s in (0.0, 0.25, 0.5, 1.0)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("weight_bits", by_default([3, 4, 8], [3]))
def test_the_solved_layer_answers_better_with_correction(weight_bits):
    def error(strength):
        scheme = GPTQScheme(weight_bits=weight_bits, group_size=32, drift_correction=strength)
        solution = solve(PROBLEM.weight_RC, HESSIAN, scheme, drift=DRIFT)
        return answer_error(PROBLEM.weight_RC, solution.weight.dequantize())

    assert error(1.0) < 0.9 * error(0.0)
    assert error(1.0) < error(0.5) < error(0.0)


def test_no_drift_changes_nothing():
    scheme = GPTQScheme(group_size=32)
    plain = solve(PROBLEM.weight_RC, HESSIAN, scheme)
    still = solve(
        PROBLEM.weight_RC,
        HESSIAN,
        GPTQScheme(group_size=32, drift_correction=1.0),
        drift=DriftSum.of(SEEN, SEEN),
    )
    np.testing.assert_array_equal(plain.weight.codes_RC, still.weight.codes_RC)


@pytest.mark.parametrize(("num_rows", "hessian_damping"), covering([60, 1024], [0.0, 0.01]))
def test_dead_and_dependent_inputs_do_not_derail_it(num_rows, hessian_damping):
    seen, exact = SEEN[:num_rows].copy(), EXACT[:num_rows].copy()
    seen[:, 5] = exact[:, 5] = 0
    seen[:, 7] = seen[:, 6]
    target = correct_target(
        PROBLEM.weight_RC,
        HessianSum.of(seen),
        DriftSum.of(exact, seen),
        strength=1.0,
        hessian_damping=hessian_damping,
    )
    assert np.isfinite(target).all()
    np.testing.assert_array_equal(target[:, 5], PROBLEM.weight_RC[:, 5])
    # Exactly or nearly singular: still no wild weights.
    assert np.abs(target).max() < 10 * np.abs(PROBLEM.weight_RC).max()
    assert answer_error(PROBLEM.weight_RC, target, seen, exact) < answer_error(
        PROBLEM.weight_RC, PROBLEM.weight_RC, seen, exact
    )


def test_a_stack_is_corrected_layer_by_layer():
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    (stacked,) = solve_stack([PROBLEM.weight_RC], HESSIAN, scheme, drift=DRIFT)
    alone = solve(PROBLEM.weight_RC, HESSIAN, scheme, drift=DRIFT)
    np.testing.assert_array_equal(stacked.weight.codes_RC, alone.weight.codes_RC)


BAD_DRIFTS = {
    "missing": (None, "no DriftSum"),
    "other rows": (DriftSum.of(EXACT[:10], SEEN[:10]), "same calibration rows"),
    "other inputs": (DriftSum.of(EXACT[:, :8], SEEN[:, :8]), "same calibration rows"),
    "not finite": (DriftSum(np.full((96, 96), np.nan, np.float32), 1024), "NaN or infinity"),
}


@pytest.mark.parametrize(("drift", "message"), BAD_DRIFTS.values(), ids=BAD_DRIFTS)
def test_a_drift_that_cannot_serve_is_refused_by_name(drift, message):
    scheme = GPTQScheme(group_size=32, drift_correction=0.5)
    with pytest.raises(CalibrationError, match=message) as caught:
        solve(PROBLEM.weight_RC, HESSIAN, scheme, drift=drift, name="block_3/query")
    assert "block_3/query" in str(caught.value)


def test_an_indefinite_hessian_is_refused_by_name():
    gram = np.eye(96, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 5.0
    scheme = GPTQScheme(group_size=32, drift_correction=0.5)
    with pytest.raises(CalibrationError, match=r"block_3/query.*indefinite.*HessianSum\.of"):
        solve(PROBLEM.weight_RC, HessianSum(gram, 1024), scheme, drift=DRIFT, name="block_3/query")


def relative_error_64(target_RC, exact, seen):
    """‖x Wᵀ - x̃ W'ᵀ‖² / ‖x Wᵀ‖²."""
    wanted = exact.astype(np.float64) @ PROBLEM.weight_RC.T.astype(np.float64)
    found = seen.astype(np.float64) @ target_RC.T.astype(np.float64)
    return np.square(wanted - found).sum() / np.square(wanted).sum()


@pytest.mark.parametrize("most", [0.25, 1.0])
def test_what_is_held_back_chooses_the_strength_with_the_least_error_on_it(most):
    scheme = GPTQScheme(group_size=32, drift_correction=most)
    found = solve(PROBLEM.weight_RC, ALL_ROWS, scheme, drift=JUDGED).report.drift

    best_RC = reference.drift_target(
        PROBLEM.weight_RC,
        EXACT[:700],
        SEEN[:700],
        strength=1.0,
        hessian_damping=scheme.hessian_damping,
    )

    def error(strength):
        target_RC = PROBLEM.weight_RC + strength * (best_RC - PROBLEM.weight_RC)
        return relative_error_64(target_RC, EXACT[HELD], SEEN[HELD])

    assert found.held_back_error == pytest.approx(error(found.strength), rel=1e-3)
    assert found.uncorrected_error == pytest.approx(error(0.0), rel=1e-3)
    errors = [error(strength) for strength in np.linspace(0, most, 11)]
    assert 0 < found.strength <= most
    assert error(found.strength) <= min(errors) + 1e-6
    assert found.held_back_error < found.uncorrected_error


def test_a_judged_correction_is_made_as_found_on_all_rows():
    judged_one = GPTQScheme(weight_bits=3, group_size=32, drift_correction=1.0)
    found = solve(PROBLEM.weight_RC, ALL_ROWS, judged_one, drift=JUDGED)
    told = GPTQScheme(weight_bits=3, group_size=32, drift_correction=found.report.drift.strength)
    expected = solve(PROBLEM.weight_RC, ALL_ROWS, told, drift=JUDGED.whole)
    np.testing.assert_array_equal(found.weight.codes_RC, expected.weight.codes_RC)
    assert expected.report.drift is None


def test_where_only_rows_held_back_have_inputs_nothing_is_corrected():
    nothing = np.zeros_like(SEEN[:700])
    held_back = HeldBackSums.of(EXACT[HELD], SEEN[HELD])
    drift = JudgedDrift(HessianSum.of(nothing), DriftSum.of(EXACT[:700], nothing), held_back)
    hessian = drift.hessian.merge(held_back.hessian)
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    found = solve(PROBLEM.weight_RC, hessian, scheme, drift=drift)
    assert found.report.drift.strength == 0
    plain = solve(PROBLEM.weight_RC, hessian, GPTQScheme(group_size=32))
    np.testing.assert_array_equal(found.weight.codes_RC, plain.weight.codes_RC)


def test_a_drift_that_is_another_on_other_rows_is_left_alone():
    drift, hessian = judged(2 * SEEN[HELD] - EXACT[HELD], SEEN[HELD])
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    found = solve(PROBLEM.weight_RC, hessian, scheme, drift=drift)
    assert found.report.drift.strength == 0
    assert found.report.drift.held_back_error == found.report.drift.uncorrected_error > 0
    plain = solve(PROBLEM.weight_RC, hessian, GPTQScheme(group_size=32))
    np.testing.assert_array_equal(found.weight.codes_RC, plain.weight.codes_RC)


def test_rows_held_back_with_nothing_in_them_correct_nothing():
    drift, hessian = judged(EXACT[:0], SEEN[:0])
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    found = solve(PROBLEM.weight_RC, hessian, scheme, drift=drift).report.drift
    assert (found.strength, found.held_back_error, found.uncorrected_error) == (0, 0, 0)


def test_slices_of_a_corrected_layer_make_the_whole(monkeypatch):
    monkeypatch.setattr("quantizer.gptq.solve._LARGEST_SLICE", 32)
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    whole = solve(PROBLEM.weight_RC, ALL_ROWS, scheme, drift=JUDGED)
    layer = check_layer(PROBLEM.weight_RC, scheme)
    parts = [solve_rows(layer, ALL_ROWS, [n], drift=JUDGED)[0] for n in (1, 0)]
    joined = join_slices(layer.weight_RC, parts[::-1], scheme)
    np.testing.assert_array_equal(joined.weight.codes_RC, whole.weight.codes_RC)
    assert joined.report == whole.report


def test_only_a_judged_layer_s_report_mentions_its_drift():
    told = solve(
        PROBLEM.weight_RC, HESSIAN, GPTQScheme(group_size=32, drift_correction=1.0), drift=DRIFT
    )
    assert "drift" not in told.report.to_dict()
    scheme = GPTQScheme(group_size=32, drift_correction=1.0)
    values = solve(PROBLEM.weight_RC, ALL_ROWS, scheme, drift=JUDGED).report.to_dict()["drift"]
    assert sorted(values) == ["held_back_error", "strength", "uncorrected_error"]
