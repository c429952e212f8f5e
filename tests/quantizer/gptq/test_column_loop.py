"""GPTQ against Algorithm 1 of its paper in float64, and the bits that it must repeat."""

import dataclasses
from functools import cache

import numpy as np
import pytest

from quantizer import (
    GPTQScheme,
    HessianSum,
    Int8Scheme,
    Scheme,
    SolveResult,
    row_slices,
    solve,
    solve_stack,
)
from tests import reference
from tests.quantizer.problems import PROBLEMS, Float32, make, without_ties


def scheme(
    weight_bits: int,
    group_size: int,
    symmetric: bool,
    activation_order: bool,
    search: bool,
    sweeps: int = 0,
    refit: bool = False,
) -> GPTQScheme:
    return GPTQScheme(
        weight_bits=weight_bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=activation_order,
        scale_search=search,
        refinement_sweeps=sweeps,
        scale_refit=refit,
    )


# Every value of every option meets every other's, and every problem, at least once.
CASES = [
    ("square", scheme(4, 64, False, False, True)),
    ("square", scheme(2, -1, True, True, True)),
    ("tall", scheme(3, 64, True, False, False)),
    ("tall", scheme(8, -1, False, True, True)),
    ("wide", scheme(4, -1, True, True, False)),
    ("wide", scheme(2, 64, False, False, False)),
    ("ragged group", scheme(3, 64, False, True, True)),
    ("ragged group", scheme(8, 64, True, False, True)),
    ("dead inputs", scheme(4, 64, False, True, False)),
    ("dead inputs", scheme(2, -1, True, False, True)),
    ("rank-deficient", scheme(3, -1, False, False, True)),
    ("rank-deficient", scheme(8, 64, True, True, False)),
    ("three panels", scheme(4, 64, True, True, True)),
    ("three panels", scheme(2, -1, False, False, True)),
    ("two slices", scheme(3, -1, True, True, False)),
    ("two slices", scheme(4, 64, False, False, True)),
    ("ragged group", scheme(3, 64, False, True, True, sweeps=2)),
    ("dead inputs", scheme(2, -1, True, False, True, sweeps=1)),
    ("three panels", scheme(4, 64, False, True, True, sweeps=2)),
    ("dead inputs", scheme(3, 64, False, True, True, sweeps=1, refit=True)),
    ("three panels", scheme(2, -1, True, True, True, sweeps=1, refit=True)),
    ("three panels", scheme(4, 96, False, False, True, sweeps=2, refit=True)),
    ("rank-deficient", scheme(2, 64, False, True, True, sweeps=1, refit=True)),
]
DEFAULT = {6, 8, 15}
"""Numbers of the cases that run by default: those that other tests need, and two slices."""
MARKED_CASES = [
    pytest.param(*case, marks=() if number in DEFAULT else pytest.mark.exhaustive)
    for number, case in enumerate(CASES)
]
EVERY_CASE = [
    (problem, scheme(bits, group_size, symmetric, order, search))
    for problem in PROBLEMS
    for bits in (2, 3, 4, 8)
    for group_size in (-1, 64)
    for symmetric in (False, True)
    for order in (False, True)
    for search in (False, True)
]


def case_id(case: tuple[str, GPTQScheme]) -> str:
    problem, options = case
    flags = ("symmetric", "activation_order", "scale_search")
    chosen = [flag for flag in flags if getattr(options, flag)]
    if options.refinement_sweeps:
        chosen.append(f"{options.refinement_sweeps} sweeps")
    if options.scale_refit:
        chosen.append("refit")
    return "-".join([problem, str(options.weight_bits), str(options.group_size), *chosen])


def options_of(options: GPTQScheme) -> dict[str, object]:
    fields = dataclasses.asdict(options)
    del fields["drift_correction"], fields["correlation_shrinkage"]
    return fields


@cache
def solved(problem: str, options: GPTQScheme) -> tuple[Float32, SolveResult, reference.Answer]:
    weight = PROBLEMS[problem].weight_RC
    if options.symmetric:
        weight = without_ties(weight, options.group_size)
    answer = reference.gptq(weight, PROBLEMS[problem].true_hessian, **options_of(options))
    return weight, solve(weight, PROBLEMS[problem].hessian, options), answer


def agreement(problem: str, options: GPTQScheme) -> tuple[float, float]:
    """Share of equal codes, and the loss as a multiple of the reference's."""
    weight, solution, answer = solved(problem, options)
    hessian = PROBLEMS[problem].true_hessian
    error = reference.loss(weight, solution.weight.dequantize(), hessian)
    return (
        float(np.mean(solution.weight.codes_RC == answer.codes_RC)),
        error / reference.loss(weight, answer.restored_RC, hessian),
    )


@pytest.mark.parametrize(("problem", "options"), MARKED_CASES, ids=map(case_id, CASES))
def test_codes_and_loss_are_those_of_the_paper(problem, options):
    equal, ratio = agreement(problem, options)
    assert equal >= 0.999
    assert ratio == pytest.approx(1, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "options"), EVERY_CASE, ids=map(case_id, EVERY_CASE))
def test_every_option_agrees_but_for_a_few_ties(problem, options):
    # A weight within float32's rounding of the middle between two codes sends the rest of its
    # output channel another, equally good way. Over so many cases a few channels meet one.
    equal, ratio = agreement(problem, options)
    assert equal >= 0.998
    assert ratio == pytest.approx(1, rel=2e-3)


@pytest.mark.parametrize(("problem", "options"), MARKED_CASES, ids=map(case_id, CASES))
def test_the_report_is_what_the_dequantized_weight_shows(problem, options):
    weight, solution, answer = solved(problem, options)
    hessian, report = PROBLEMS[problem].true_hessian, solution.report
    restored = solution.weight.dequantize()
    assert report.output_error == pytest.approx(reference.loss(weight, restored, hessian), rel=1e-3)
    # Of the weight as given, dead inputs and all.
    assert report.weight_error == pytest.approx(
        reference.relative_weight_error(weight, restored), rel=1e-3
    )
    assert report.rtn_output_error == pytest.approx(
        reference.loss(weight, answer.rtn_RC, hessian), rel=1e-3
    )
    assert report.output_error <= report.rtn_output_error
    assert report.rtn_rows == answer.rtn_rows
    assert report.num_rows == len(PROBLEMS[problem].inputs_NC)
    assert report.damping == options.hessian_damping


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_codes_are_found_on_the_stored_scale(scale_dtype):
    problem, options = PROBLEMS["tall"], GPTQScheme(weight_bits=4, group_size=64)
    solution = solve(problem.weight_RC, problem.hessian, options, scale_dtype=scale_dtype)
    answer = reference.gptq(
        problem.weight_RC,
        problem.true_hessian,
        **options_of(options),
        scale_dtype=scale_dtype,
    )
    scale = solution.weight.scale_RG
    np.testing.assert_array_equal(scale, reference.stored(scale, scale_dtype))
    assert np.mean(solution.weight.codes_RC == answer.codes_RC) >= 0.999


def test_correlations_count_as_far_as_the_scheme_says():
    given = make(8, 48, 384)
    options = GPTQScheme(group_size=16, refinement_sweeps=1)
    shrinking = dataclasses.replace(options, correlation_shrinkage=2.0)
    solution = solve(given.weight_RC, given.hessian, shrinking)
    by_hand = solve(given.weight_RC, given.hessian.shrunk(2.0), options)
    same_bits(solution, by_hand)
    assert solution.report.output_error == by_hand.report.output_error
    assert "counted for 80%" in solution.report.reason
    plain = solve(given.weight_RC, given.hessian, options)
    assert (plain.weight.codes_RC != solution.weight.codes_RC).any()


def test_activation_order_leaves_groups_in_the_order_of_the_inputs():
    _, solution, _ = solved(*CASES[6])
    np.testing.assert_array_equal(solution.weight.group_C, np.arange(200) // 64)


def test_each_output_channel_is_no_worse_than_round_to_nearest():
    weight, solution, answer = solved("two slices", scheme(4, 64, False, False, True))
    hessian = PROBLEMS["two slices"].true_hessian
    ours = reference.row_losses(weight - solution.weight.dequantize(), hessian)
    rounded = reference.row_losses(weight - answer.rtn_RC, hessian)
    assert (ours <= rounded * (1 + 1e-4)).all()
    assert solution.report.kept == "gptq+rtn"
    assert f"round-to-nearest in {answer.rtn_rows}" in solution.report.reason


def test_uncorrelated_inputs_leave_round_to_nearest():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 32)).astype(np.float32)
    hessian = HessianSum(np.eye(32, dtype=np.float32), 1)
    options = GPTQScheme(group_size=-1, scale_search=False)
    solution = solve(weight, hessian, options)
    answer = reference.gptq(weight, 2 * np.eye(32), **options_of(options))
    np.testing.assert_allclose(solution.weight.dequantize(), answer.rtn_RC, rtol=1e-6)


def test_a_symmetric_tie_costs_the_same_on_either_side():
    # -max lies half a step below code 1 and half a step above code 0.
    channels = np.resize(np.float32([1, 0.3, 0.7]), 16)
    weight = np.outer(channels, np.resize(np.float32([-1.0, 0.25, 0.5, 0.1]), 32))
    hessian = HessianSum(np.eye(32, dtype=np.float32), 1)
    solution = solve(weight, hessian, GPTQScheme(group_size=-1, symmetric=True, scale_search=False))
    miss = np.abs(weight - solution.weight.dequantize())[:, 0]
    np.testing.assert_allclose(miss, solution.weight.scale_RG[:, 0] / 2, rtol=1e-5)


def same_bits(one: SolveResult, other: SolveResult) -> None:
    for field in ("codes_RC", "scale_RG", "zero_RG", "group_C"):
        np.testing.assert_array_equal(getattr(one.weight, field), getattr(other.weight, field))


def test_row_slices_solved_apart_equal_the_whole():
    options = scheme(4, 64, False, False, True, sweeps=1, refit=True)
    weight, whole, _ = solved("two slices", options)
    hessian = PROBLEMS["two slices"].hessian
    slices = row_slices(*weight.shape)
    assert slices == [(0, 384), (384, 768), (768, 1100)]
    parts = [solve(weight[a:b], hessian, options) for a, b in slices]
    for field in ("codes_RC", "scale_RG", "zero_RG"):
        joined = np.concatenate([getattr(part.weight, field) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole.weight, field))
    assert sum(part.report.output_error for part in parts) == pytest.approx(
        whole.report.output_error, rel=1e-12
    )


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[0], marks=pytest.mark.exhaustive), CASES[8]],
    ids=map(case_id, [CASES[0], CASES[8]]),
)
def test_a_second_run_gives_the_same_bits(case):
    weight, first, _ = solved(*case)
    second = solve(weight, PROBLEMS[case[0]].hessian, case[1])
    same_bits(first, second)
    assert first.report == second.report


STACKED = [CASES[8], CASES[4], CASES[9]]


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(case, marks=pytest.mark.exhaustive) for case in STACKED[1:]), STACKED[0]],
    ids=map(case_id, [*STACKED[1:], STACKED[0]]),
)
def test_a_stack_equals_its_layers_solved_apart(case):
    weight, whole, _ = solved(*case)
    # The second layer has fewer outputs, as a key's projection has beside a query's.
    weights = [weight, weight[:32][:, ::-1]]
    stack = solve_stack(weights, PROBLEMS[case[0]].hessian, case[1], names=["query", "key"])
    same_bits(stack[0], whole)
    assert stack[0].report == whole.report
    alone = solve(weights[1], PROBLEMS[case[0]].hessian, case[1])
    same_bits(stack[1], alone)
    assert stack[1].report == alone.report


def test_an_empty_stack_has_no_solutions():
    assert solve_stack([], PROBLEMS["tall"].hessian, GPTQScheme()) == []


UNSEEN = [
    scheme(4, 64, False, True, False),
    scheme(2, -1, True, False, True),
    scheme(3, 64, False, True, True, sweeps=2, refit=True),
    dataclasses.replace(scheme(8, 64, False, False, True, sweeps=1), hessian_damping=0.0),
]


@pytest.mark.parametrize(
    "options",
    [pytest.param(x, marks=() if x is UNSEEN[2] else pytest.mark.exhaustive) for x in UNSEEN],
    ids=[case_id(("unseen", case)) for case in UNSEEN],
)
def test_weights_of_inputs_never_seen_are_rounded_to_nearest(options):
    problem = make(384, 192, 512, dead=16)
    solution = solve(problem.weight_RC, problem.hessian, options)
    weight, dead = solution.weight, ~problem.inputs_NC.any(0)
    scale, zero = (
        values[:, weight.group_C][:, dead] for values in (weight.scale_RG, weight.zero_RG)
    )
    nearest = reference.nearest(
        problem.weight_RC[:, dead].astype(np.float64), scale, zero, 2**options.weight_bits - 1
    )
    np.testing.assert_array_equal(weight.codes_RC[:, dead], nearest)
    assert solution.report.dead_inputs == 16


def test_inputs_with_next_to_no_energy_are_counted_apart_from_those_never_seen():
    problem = make(48, 64, 512, dead=16)
    inputs_NC = problem.inputs_NC.copy()
    living = np.flatnonzero(inputs_NC.any(0))
    inputs_NC[:, living[:5]] *= 1e-4
    found = solve(problem.weight_RC, HessianSum.of(inputs_NC), GPTQScheme(group_size=64)).report
    assert (found.dead_inputs, found.faint_inputs) == (16, 5)
    assert found.to_dict()["faint_inputs"] == 5
    none = solve(problem.weight_RC, problem.hessian, GPTQScheme(group_size=64)).report
    assert "faint_inputs" not in none.to_dict()


def test_inputs_never_seen_answer_other_text_as_rounding_does():
    problem, options = make(48, 64, 512, dead=16), GPTQScheme(weight_bits=8, group_size=64)
    # What these inputs would have been, had calibration not left sixteen of them at zero.
    other = make(48, 64, 512).inputs_NC
    np.testing.assert_array_equal(problem.inputs_NC != 0, (problem.inputs_NC == other))

    def error(chosen: Scheme) -> float:
        restored = solve(problem.weight_RC, problem.hessian, chosen).weight.dequantize()
        missing = other @ (problem.weight_RC - restored).T
        return float(np.linalg.norm(missing) / np.linalg.norm(other @ problem.weight_RC.T))

    # Weights of zero would cost a third of the output.
    assert error(options) < 1.5 * error(Int8Scheme())


def test_weights_of_inputs_never_seen_add_nothing_to_the_output_error():
    problem = make(48, 64, 512, dead=16)
    seen = problem.inputs_NC.any(0)
    # What rounding in float32 leaves of the large ones exceeds all that the small ones can cost.
    weight = np.where(seen, problem.weight_RC * np.float32(1e-8), problem.weight_RC)
    apart = np.concatenate([weight[:, seen], weight[:, ~seen]], axis=1)
    inputs = np.concatenate([problem.inputs_NC[:, seen], problem.inputs_NC[:, ~seen]], axis=1)
    solution = solve(apart, HessianSum.of(inputs), GPTQScheme(group_size=64))
    error = reference.loss(apart, solution.weight.dequantize(), reference.hessian_of(inputs))
    assert solution.report.output_error == pytest.approx(error, rel=1e-3)


def test_bits_of_the_weight_dtype_are_used_as_they_are():
    problem = make(8, 48, 64)
    half = problem.weight_RC.astype(np.float16)
    options = GPTQScheme(group_size=16)
    same_bits(
        solve(half, problem.hessian, options),
        solve(half.astype(np.float32), problem.hessian, options),
    )


def test_a_larger_scale_of_inputs_changes_nothing_but_the_loss():
    problem = make(8, 48, 64)
    options = GPTQScheme(group_size=16)
    small = solve(problem.weight_RC, problem.hessian, options)
    # A power of two: exact.
    large = solve(problem.weight_RC, HessianSum.of(problem.inputs_NC * 2**10), options)
    same_bits(small, large)
    assert large.report.output_error == small.report.output_error * 2**20
