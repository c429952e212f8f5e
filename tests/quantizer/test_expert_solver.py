"""Experts are solved each from its own rows; few rows correlate less, none rounds to nearest."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

import quantizer.gptq.solve
from pipeline.canonical import canonical_json
from quantizer import HessianSum, solve
from quantizer.expert_codes import ExpertCodes
from quantizer.expert_solver import (
    concurrent_experts,
    join_experts,
    round_experts,
    solve_experts,
)
from quantizer.experts import ExpertHessians, token_floor
from quantizer.result import GroupedWeight, output_error
from quantizer.schemes import GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import check_layer

IN_FEATURES, OUT_FEATURES = 32, 24
FLOOR = token_floor(IN_FEATURES)
SCHEME = GPTQScheme(weight_bits=3, group_size=16, scale_search=False)


def rows(number: int, seed: int) -> NDArray[np.float32]:
    """Inputs of various sizes with weak correlations, as products of gates and values have."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    mixing = np.eye(IN_FEATURES) + 0.1 * fixed.normal(size=(IN_FEATURES, IN_FEATURES))
    scale = np.exp(fixed.normal(size=IN_FEATURES))
    return np.asarray(rng.normal(size=(number, IN_FEATURES)) @ mixing * scale, np.float32)


def statistics(*numbers: int, first: int = 0) -> ExpertHessians:
    sums = [HessianSum.of(rows(number, seed)) for seed, number in enumerate(numbers)]
    return ExpertHessians(np.stack([one.gram_CC for one in sums]), np.array(numbers), first)


def problems(number: int, scheme: Scheme = SCHEME) -> list[Any]:
    rng = np.random.default_rng(7)
    weights = rng.normal(size=(number, OUT_FEATURES, IN_FEATURES)).astype(np.float32)
    return [check_layer(weight, scheme, name=f"expert {i}") for i, weight in enumerate(weights)]


def test_an_expert_is_solved_as_a_layer_of_its_own_with_its_own_correlations_shrunk() -> None:
    given = statistics(FLOOR, 2 * FLOOR, first=3)
    found = solve_experts(problems(2), given, [3, 4])
    for number, problem, one in zip((3, 4), problems(2), found, strict=True):
        hessian = given.of_expert(number).shrunk(1)
        alone = solve(problem.weight_RC, hessian, SCHEME, name=problem.name)
        assert one.report == alone.report
        assert one.num_rows == given.of_expert(number).num_rows
        assert isinstance(alone.weight, GroupedWeight)
        np.testing.assert_array_equal(one.weight.codes_RC, alone.weight.codes_RC)
        np.testing.assert_array_equal(one.weight.scale_RG, alone.weight.scale_RG)


def test_only_experts_of_moderate_size_are_solved_two_at_a_time() -> None:
    assert [concurrent_experts(size) for size in (768, 2880, 4096, 14336)] == [2, 2, 1, 1]


class CopiedHessians(ExpertHessians):
    """As on a device, where one expert's sum is a copy; counts how many there are."""

    live = most = 0

    def of_expert(self, expert: int) -> HessianSum:
        gram_CC = self.gram_ECC[self.experts.index(expert)] + 0
        CopiedHessians.live += 1
        CopiedHessians.most = max(self.most, self.live)
        weakref.finalize(gram_CC, self._freed)
        return HessianSum(gram_CC, int(self.rows_E[self.experts.index(expert)]))

    @staticmethod
    def _freed() -> None:
        CopiedHessians.live -= 1


def test_no_more_hessians_are_copied_than_are_being_solved() -> None:
    given = statistics(*[FLOOR] * 8)
    copied = CopiedHessians(np.asarray(given.gram_ECC), given.rows_E)
    assert len(solve_experts(problems(8), copied, range(8))) == 8
    assert 0 < copied.most <= concurrent_experts(IN_FEATURES) + 1


def test_what_is_compiled_does_not_grow_with_the_number_of_experts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    solve_experts(problems(2), statistics(FLOOR, 0), range(2))
    caplog.clear()
    jax.config.update("jax_log_compiles", True)
    try:
        solve_experts(problems(9), statistics(*range(0, 9 * FLOOR, FLOOR)), range(9))
    finally:
        jax.config.update("jax_log_compiles", False)
    assert not [each for each in caplog.records if each.getMessage().startswith("Compiling")]


def test_a_scheme_that_shrinks_correlations_says_how_far_for_experts_too() -> None:
    scheme = replace(SCHEME, correlation_shrinkage=3.0)
    [given] = problems(1)
    hessian = HessianSum.of(rows(IN_FEATURES, 0))
    statistics = ExpertHessians(hessian.gram_CC[None], np.array([hessian.num_rows]))
    [solved] = solve_experts([replace(given, scheme=scheme)], statistics, [0])
    alone = solve(given.weight_RC, hessian.shrunk(3.0), SCHEME).weight
    np.testing.assert_array_equal(solved.weight.codes_RC, alone.codes_RC)


@pytest.mark.parametrize(
    ("number", "share"), [(IN_FEATURES // 3, 10 / 42), (IN_FEATURES, 0.5), (FLOOR, 0.8)]
)
def test_correlations_count_the_more_rows_there_are_and_energies_in_full(
    number: int, share: float
) -> None:
    few = HessianSum.of(rows(number, 0))
    found = few.shrunk(1)
    assert found.num_rows == few.num_rows
    np.testing.assert_array_equal(found.gram_CC.diagonal(), few.gram_CC.diagonal())
    off = ~np.eye(IN_FEATURES, dtype=bool)
    np.testing.assert_allclose(found.gram_CC[off], few.gram_CC[off] * share, rtol=1e-6)


@pytest.mark.parametrize("number", [IN_FEATURES // 2, IN_FEATURES, 2 * IN_FEATURES, FLOOR])
def test_few_rows_never_cost_more_than_rounding_on_other_rows(number: int) -> None:
    """As plain GPTQ does: what it corrects are the errors of the rows that it saw."""
    [problem] = problems(1)
    other = HessianSum.of(rows(2000, 1234))

    def error(hessian: HessianSum) -> float:
        weight = solve(problem.weight_RC, hessian, SCHEME).weight
        return output_error(problem.weight_RC, weight.dequantize(), other)

    rounded = error(HessianSum(np.eye(IN_FEATURES, dtype=np.float32), 1))
    [found] = solve_experts([problem], statistics(number), [0])
    ours = output_error(problem.weight_RC, found.weight.dequantize(), other)
    assert ours < rounded
    plain = error(HessianSum.of(rows(number, 0)))
    assert ours < plain
    if number == IN_FEATURES // 2:
        assert plain > rounded


def test_an_expert_that_nothing_reached_is_rounded_and_named() -> None:
    given = statistics(FLOOR, FLOOR, FLOOR, 0)
    given.gram_ECC[1, 2, 2] = np.nan
    solved = solve_experts(problems(4), given, range(4))
    weight, report = join_experts(solved)
    assert weight.codes_RC.shape == (4 * OUT_FEATURES, IN_FEATURES)
    reasons = {numbers[0]: reason for reason, numbers in report["experts"]["rounded"].items()}
    assert reasons.keys() == {1, 3}
    assert reasons[3] == "no token of the calibration reached this expert"
    assert "expert 1: the Hessian contains NaN" in reasons[1]
    nearest = HessianSum(np.eye(IN_FEATURES, dtype=np.float32), 1)
    for number in (1, 3):
        alone = solve(problems(4)[number].weight_RC, nearest, SCHEME).weight
        assert isinstance(alone, GroupedWeight)
        np.testing.assert_array_equal(solved[number].weight.codes_RC, alone.codes_RC)
    assert report["num_rows"] == 2 * FLOOR
    assert report["rtn_rows"] >= 2 * OUT_FEATURES
    assert "2 experts were not calibrated" in report["reason"]
    assert json.loads(canonical_json(report)) == report


def test_a_bank_without_any_usable_rows_says_so() -> None:
    _, report = join_experts(solve_experts(problems(2), statistics(0, 0), range(2)))
    assert report["kept"] == "rtn"
    assert report["output_error"] is None
    assert report["num_rows"] == 0
    assert report["reason"].startswith("not calibrated, rounded to nearest: no token")


def test_errors_of_a_bank_are_those_of_all_its_rows_with_correlations_shrunk() -> None:
    numbers = [FLOOR, 3 * FLOOR, 2 * FLOOR]
    solved = solve_experts(problems(3), statistics(*numbers), range(3))
    _, report = join_experts(solved)
    assert report["experts"]["tokens"] == [FLOOR, 2 * FLOOR, 3 * FLOOR]
    assert report["experts"]["below_floor"] == 0
    assert report["experts"]["floor"] == FLOOR
    squares = difference = energy = 0.0
    for number, problem, one in zip(range(3), problems(3), solved, strict=True):
        delta = (problem.weight_RC - one.weight.dequantize()).astype(np.float64)
        hessian = HessianSum.of(rows(numbers[number], number)).shrunk(1)
        squares += float(np.einsum("rc,cd,rd->", delta, hessian.gram_CC, delta))
        difference += float(np.sum(delta**2))
        energy += float(np.sum(problem.weight_RC.astype(np.float64) ** 2))
    assert report["output_error"] == pytest.approx(2 * squares / sum(numbers), rel=1e-4)
    assert report["weight_error"] == pytest.approx((difference / energy) ** 0.5, rel=1e-5)
    assert report["output_error"] < report["rtn_output_error"]


@pytest.mark.parametrize(
    ("scheme", "levels"),
    [(Int8Scheme(), 127), (Int4Scheme(block_size=-1), 7), (Int4Scheme(block_size=8), 7.5)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounded_experts_are_within_half_a_step(scheme: Any, levels: float, dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight_RC = rng.normal(size=(6, IN_FEATURES), scale=1e-3).astype(np.float32)
    weight_RC[3] = 0
    problems = [check_layer(part, scheme, scale_dtype=dtype) for part in np.split(weight_RC, 2)]
    weight, report = round_experts(problems, scheme)
    codes = ExpertCodes.of(weight, scheme, 2, dtype)
    assert str(codes.scale_ERG.dtype) == dtype
    assert codes.codes_ERC.max() < 2**codes.bits
    values_RC = np.concatenate([codes.dequantize(0), codes.dequantize(1)])
    error = np.linalg.norm(values_RC - weight_RC) / np.linalg.norm(weight_RC)
    assert report.weight_error == pytest.approx(float(error), rel=1e-4)
    assert report.rtn_rows == 6
    assert (values_RC[3] == 0).all()
    step_R = np.abs(weight_RC).max(1, keepdims=True) / levels
    # Scales in 16 bits may clip a largest weight by their own rounding.
    slack = {"float32": 1e-5, "bfloat16": 2**-9 * levels, "float16": 2e-2}[dtype]
    assert (np.abs(values_RC - weight_RC) <= (0.5 + slack) * step_R).all()


def test_an_expert_s_grid_is_found_on_the_device_that_solves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [cpu] = jax.devices()
    found: Counter[Any] = Counter()
    find = quantizer.gptq.solve._find_grid

    def finding(*args: Any) -> Any:
        found[jax.config.jax_default_device] += 1
        return find(*args)

    monkeypatch.setattr(quantizer.gptq.solve, "_find_grid", finding)
    solve_experts(problems(3), statistics(FLOOR, FLOOR, FLOOR), range(3), devices=[cpu, cpu])
    assert found == {None: 2, cpu: 1}
