"""AWQ against its paper's search in float64."""

import numpy as np
import pytest

from quantizer import AWQScheme, Int4Scheme, SchemeError, awq, solve, solve_stack
from quantizer.awq import solve_awq
from quantizer.hessian import HessianSum
from quantizer.solver import check_layer
from tests import reference
from tests.quantizer.problems import PROBLEMS, Problem, make

CASES = [
    ("square", AWQScheme(group_size=64, num_grid_points=10)),
    ("tall", AWQScheme(group_size=-1, clip_search=False)),
    ("wide", AWQScheme(group_size=64, clip_search=False)),
    ("ragged group", AWQScheme(group_size=64)),
    ("dead inputs", AWQScheme(group_size=-1, num_grid_points=7)),
    ("rank-deficient", AWQScheme(group_size=64, num_grid_points=10)),
    ("three panels", AWQScheme(group_size=64, num_grid_points=5)),
    ("two slices", AWQScheme(group_size=64, num_grid_points=10)),
]
SEEN = [(*case, "hessian") for case in CASES] + [(*case, "magnitudes") for case in CASES[1:5]]
MARKED = [
    pytest.param(*case, marks=() if case[0] in ("tall", "dead inputs") else pytest.mark.exhaustive)
    for case in SEEN
]


@pytest.mark.parametrize(("name", "scheme", "known"), MARKED, ids=[f"{c[0]}-{c[2]}" for c in SEEN])
def test_codes_and_loss_are_those_of_the_paper(name, scheme, known):
    problem = PROBLEMS[name]
    weight, rows = problem.weight_RC, problem.inputs_NC.astype(np.float64)
    if known == "hessian":
        hessian, magnitude = problem.true_hessian, np.sqrt(np.square(rows).mean(0))
    else:
        hessian = np.diag(np.diagonal(problem.true_hessian))
        magnitude = np.abs(rows).mean(0)
    solution = solve(weight, getattr(problem, known), scheme)
    answer = reference.awq(
        weight,
        magnitude,
        hessian,
        group_size=scheme.group_size,
        num_grid_points=scheme.num_grid_points,
        clip_search=scheme.clip_search,
    )
    restored, report = solution.weight.dequantize(), solution.report
    assert np.mean(solution.weight.codes_RC == answer.codes_RC) >= 0.999
    error = reference.loss(weight, restored, hessian)
    assert error == pytest.approx(reference.loss(weight, answer.restored_RC, hessian), rel=1e-3)
    assert report.output_error == pytest.approx(error, rel=1e-3)
    assert report.rtn_output_error == pytest.approx(
        reference.loss(weight, answer.rtn_RC, hessian), rel=1e-3
    )
    assert report.output_error <= report.rtn_output_error
    assert report.weight_error == pytest.approx(
        reference.relative_weight_error(weight, restored), rel=1e-3
    )
    assert report.dead_inputs == np.sum(~problem.inputs_NC.any(0))
    assert report.num_rows == len(rows)


def test_the_best_exponent_and_why_are_in_the_report():
    problem = PROBLEMS["tall"]
    report = solve(problem.weight_RC, problem.hessian, CASES[1][1]).report
    assert report.kept == "awq"
    assert 0 < report.ratio <= 1
    assert f"magnitude^{report.ratio:.2f}" in report.reason


def test_nothing_gained_keeps_round_to_nearest():
    # Weights on the grid already: no scale or clipping can gain anything.
    weight = np.tile(np.arange(-8, 8, dtype=np.float32), (4, 4))
    problem = PROBLEMS["tall"]
    solution = solve(weight, problem.hessian, AWQScheme(group_size=-1))
    assert solution.report.kept == "rtn"
    assert solution.report.rtn_rows == 4
    assert solution.report.ratio == 0
    np.testing.assert_allclose(solution.weight.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_scales_are_stored_values(scale_dtype):
    problem = PROBLEMS["tall"]
    solution = solve(problem.weight_RC, problem.hessian, CASES[1][1], scale_dtype=scale_dtype)
    for scale in (solution.weight.scale_RG, solution.weight.input_scale_C):
        np.testing.assert_array_equal(scale, reference.stored(scale, scale_dtype))
    error = reference.loss(problem.weight_RC, solution.weight.dequantize(), problem.true_hessian)
    assert solution.report.output_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("size", [2.0**-12, 1.0, 2.0**12])
@pytest.mark.parametrize("known", ["hessian", "magnitudes"])
def test_inputs_never_seen_are_scaled_as_average_ones(size, known):
    problem = make(48, 64, 512, dead=16)
    # What these inputs would have been, had calibration not left sixteen of them at zero.
    other = make(48, 64, 512).inputs_NC
    seen = Problem(problem.weight_RC, problem.inputs_NC * np.float32(size))
    solution = solve(problem.weight_RC, getattr(seen, known), AWQScheme(group_size=32))
    rounded = solve(problem.weight_RC, None, Int4Scheme(block_size=32))
    assert solution.report.ratio > 0
    awq, nearest = (
        np.linalg.norm(other @ (problem.weight_RC - result.weight.dequantize()).T)
        for result in (solution, rounded)
    )
    assert awq < 1.2 * nearest


def test_a_second_run_gives_the_same_bits():
    problem, scheme = PROBLEMS["tall"], CASES[1][1]
    first = solve(problem.weight_RC, problem.hessian, scheme)
    second = solve(problem.weight_RC, problem.hessian, scheme)
    assert first.report == second.report
    np.testing.assert_array_equal(first.weight.codes_RC, second.weight.codes_RC)
    np.testing.assert_array_equal(first.weight.input_scale_C, second.weight.input_scale_C)


def test_all_groups_together_give_what_each_gives_alone(monkeypatch):
    problem, scheme = PROBLEMS["tall"], AWQScheme(group_size=16, num_grid_points=3)
    alone = solve(problem.weight_RC, problem.hessian, scheme)
    monkeypatch.setattr(awq, "_all_groups_together", lambda: True)
    together = solve(problem.weight_RC, problem.hessian, scheme)
    np.testing.assert_array_equal(together.weight.codes_RC, alone.weight.codes_RC)
    np.testing.assert_array_equal(together.weight.scale_RG, alone.weight.scale_RG)
    assert together.report == alone.report


FOLDABLE = AWQScheme(group_size=32, num_grid_points=6, foldable=True)


def stack(problem):
    """Layers of one input that would choose other scales if each were alone."""
    weight = problem.weight_RC
    few = weight[:64] * np.where(np.arange(weight.shape[1]) % 7 == 0, 12, 1).astype(np.float32)
    return [weight[:128], few, 0.5 * weight[-32:]]


@pytest.mark.parametrize(
    "known", ["hessian", pytest.param("magnitudes", marks=pytest.mark.exhaustive)]
)
def test_foldable_scales_have_the_least_error_of_all_layers_together(known):
    problem = PROBLEMS["tall"]
    weights, rows = stack(problem), problem.inputs_NC.astype(np.float64)
    magnitude, hessian = np.sqrt(np.square(rows).mean(0)), problem.true_hessian
    if known == "magnitudes":
        magnitude, hessian = np.abs(rows).mean(0), np.diag(np.diagonal(hessian))
    solutions = solve_stack(weights, getattr(problem, known), FOLDABLE)
    answers = reference.awq_together(
        weights, magnitude, hessian, group_size=32, num_grid_points=6, clip_search=True
    )
    scales = [solution.weight.input_scale_C for solution in solutions]
    for scale in scales[1:]:
        np.testing.assert_array_equal(scale, scales[0])
    assert len(np.unique(scales[0])) > 1
    for weight, solution, answer in zip(weights, solutions, answers, strict=True):
        assert np.mean(solution.weight.codes_RC == answer.codes_RC) >= 0.999
        error = reference.loss(weight, answer.restored_RC, hessian)
        assert solution.report.output_error == pytest.approx(error, rel=1e-3)
    alone = [solve(weight, getattr(problem, known), FOLDABLE).report for weight in weights]
    assert len({report.ratio for report in alone}) > 1
    assert sum(s.report.output_error for s in solutions) <= sum(
        s.report.rtn_output_error for s in solutions
    )


def test_inputs_of_one_number_share_a_scale():
    problem = PROBLEMS["tall"]
    layers = [check_layer(weight, FOLDABLE) for weight in stack(problem)]
    pairs = np.arange(64) // 2
    for solution in solve_awq(layers, problem.hessian, FOLDABLE, pairs):
        scale = solution.weight.input_scale_C
        np.testing.assert_array_equal(scale[::2], scale[1::2])
        assert len(np.unique(scale)) == 32


def test_without_a_place_for_scales_only_the_ranges_are_searched():
    problem = PROBLEMS["tall"]
    layers = [check_layer(weight, FOLDABLE) for weight in stack(problem)]
    nowhere = np.zeros(64, np.intp)
    for solution in solve_awq(layers, problem.hessian, FOLDABLE, nowhere):
        np.testing.assert_array_equal(solution.weight.input_scale_C, 1)
        assert solution.report.ratio == 0
        assert "clipping lowered" in solution.report.reason
        assert solution.report.output_error < solution.report.rtn_output_error


def test_layers_without_scales_do_not_depend_on_each_other():
    """Workers share them out, and there may be any number of these."""
    rng = np.random.default_rng(0)
    # All inputs move together, so that errors of one sign add up: clipping helps some layers only.
    inputs = 3 * rng.normal(size=(256, 1)) + 0.3 * rng.normal(size=(256, 64))
    hessian = HessianSum((inputs.T @ inputs).astype(np.float32), 256)
    rng = np.random.default_rng(1)
    normal, tailed, long_tailed = rng.normal(size=(64, 64)), *rng.exponential(size=(2, 64, 64))
    weights = [4 * normal, tailed, long_tailed**2]
    dtypes = ("float32", "float32", "bfloat16")
    layers = [
        check_layer(weight.astype(np.float32), FOLDABLE, scale_dtype=dtype)
        for weight, dtype in zip(weights, dtypes, strict=True)
    ]
    nowhere = np.zeros(64, np.intp)
    alone = [solve_awq([layer], hessian, FOLDABLE, nowhere)[0] for layer in layers]
    assert {solution.report.kept for solution in alone} == {"awq", "rtn"}
    for one, other in zip(alone, solve_awq(layers, hessian, FOLDABLE, nowhere), strict=True):
        np.testing.assert_array_equal(one.weight.codes_RC, other.weight.codes_RC)
        assert one.report == other.report


def test_one_vector_of_scales_has_one_dtype():
    problem = PROBLEMS["tall"]
    layers = [
        check_layer(problem.weight_RC, FOLDABLE, scale_dtype=dtype, name=f"dense in {dtype}")
        for dtype in ("bfloat16", "float32")
    ]
    with pytest.raises(SchemeError, match="several dtypes: dense in bfloat16 in bfloat16, dense"):
        solve_awq(layers, problem.hessian, FOLDABLE)
