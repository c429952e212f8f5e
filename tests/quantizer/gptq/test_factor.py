"""The factor: H + shift as A D Aᵀ, the paper's corrections, and what happens when H resists."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, solve
from quantizer.gptq.factor import (
    block_size,
    dampings,
    factorize,
    factorize_shifted,
    factorize_whole,
    panel_bounds,
)
from tests import reference
from tests.quantizer.problems import make


@pytest.fixture(params=[factorize_shifted, factorize_whole], ids=["CPU", "GPU"])
def factor_of(request):
    def factor(problem, *, hessian_damping=0.01, activation_order=False):
        hessian = problem.hessian
        return factorize(
            jnp.asarray(hessian.gram_CC),
            hessian.num_rows,
            hessian_damping=hessian_damping,
            activation_order=activation_order,
            shifted=request.param,
        )

    return factor


@dataclass
class Given:
    hessian: HessianSum


def unit_factor(factor):
    """A, from the transposed blocks of its panels."""
    size = len(factor.order_C)
    matrix = np.zeros((size, size))
    a = 0
    for blocks in factor.panels:
        panel = np.concatenate(blocks, axis=1)
        b = panel.shape[1]
        matrix[:b, a:b] = panel.T
        a = b
    return matrix


SIZES = {"one panel": 200, "three panels": 1100}


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_multiplies_out_to_the_damped_hessian(factor_of, size, activation_order):
    problem = make(1, size, 2 * size)
    factor = factor_of(problem, activation_order=activation_order)
    unit, pivots = unit_factor(factor), np.asarray(factor.pivot_C, np.float64)
    np.testing.assert_array_equal(unit, np.triu(unit))
    np.testing.assert_allclose(np.diagonal(unit), 1, rtol=1e-6)

    order = np.asarray(factor.order_C)[:size]
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    energy = np.diagonal(problem.true_hessian)
    if activation_order:
        assert (np.diff(energy[order]) <= 1e-5 * energy[order][:-1]).all()
    wanted = reference.damped(problem.true_hessian, 0.01)[np.ix_(order, order)]
    product = (unit * pivots @ unit.T)[:size, :size]
    assert np.abs(product - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert float(factor.shift) == pytest.approx(0.01 * energy.mean(), rel=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_holds_the_corrections_of_the_paper(factor_of, size):
    problem = make(1, size, 2 * size)
    factor = factor_of(problem)
    upper = reference.inverse_factor(reference.damped(problem.true_hessian, 0.01))
    # Alg. 1 spreads (w̃_j - ŵ_j) / U_jj over U_j,: ; unrolled, column k receives the errors
    # w_i - ŵ_i of all earlier columns times (D^½ U)⁻¹_ik.
    wanted = np.linalg.inv(upper / np.diagonal(upper)[:, None])
    unit = unit_factor(factor)[:size, :size]
    assert np.abs(unit - wanted).max() <= 1e-3 * np.abs(wanted - np.eye(size)).max()
    pivots = np.asarray(factor.pivot_C)[:size]
    np.testing.assert_allclose(pivots, 1 / np.diagonal(upper) ** 2, rtol=1e-3)


def test_panels_are_whole_blocks_and_those_of_the_padded_size():
    for size in range(1, 6000):
        bounds = panel_bounds(size)
        end = bounds[-1][1]
        assert panel_bounds(end) == bounds
        assert size <= end < size + block_size(bounds[-1][1] - bounds[-1][0])
        assert [a for a, _ in bounds] == [512 * i for i in range(len(bounds))]
        assert all((b - a) % block_size(b - a) == 0 for a, b in bounds)


def test_padding_is_coupled_to_nothing(factor_of):
    factor = factor_of(make(1, 200, 400))
    unit = unit_factor(factor)
    assert unit.shape == (224, 224)
    np.testing.assert_array_equal(unit[:, 200:], np.eye(224)[:, 200:])
    np.testing.assert_array_equal(np.asarray(factor.order_C)[200:], np.arange(200, 224))


def test_dead_inputs_are_found_and_coupled_to_nothing(factor_of):
    problem = make(1, 200, 400, dead=5)
    factor = factor_of(problem)
    dead = ~problem.inputs_NC.any(0)
    np.testing.assert_array_equal(factor.dead_C, dead)
    unit = unit_factor(factor)[:200, :200]
    np.testing.assert_array_equal(unit[dead], np.eye(200)[dead])
    np.testing.assert_array_equal(unit[:, dead], np.eye(200)[:, dead])
    # Their share of the damping's mean is none.
    live = np.diagonal(problem.true_hessian)[~dead]
    assert float(factor.shift) == pytest.approx(0.01 * live.mean(), rel=1e-5)


def test_it_fails_where_the_hessian_is_not_definite(factor_of):
    gram = np.eye(32, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 5.0
    assert factor_of(Given(HessianSum(gram, 10))) is None


def test_damping_is_raised_until_it_can_be_factored(factor_of):
    factor = factor_of(make(1, 200, 40), hessian_damping=0.0)
    assert 0 < factor.damping <= 0.01
    assert np.isfinite(unit_factor(factor)).all()


@pytest.mark.parametrize("hessian_damping", [0.0, 1e-6, 0.01, 0.3, 1.0])
def test_tries_rise_from_the_wanted_damping_to_one(hessian_damping):
    tries = dampings(hessian_damping)
    assert tries[0] == hessian_damping
    assert tries[-1] == 1
    assert tries == sorted(set(tries))
    assert len(tries) <= 8


def test_a_singular_hessian_raises_the_damping_and_the_report_says_so():
    problem = make(16, 200, 40)
    solution = solve(
        problem.weight_RC, problem.hessian, GPTQScheme(group_size=-1, hessian_damping=0.0)
    )
    report = solution.report
    assert 0 < report.damping <= 0.01
    assert f"damping was raised from 0 to {report.damping:g}" in report.reason
    assert report.output_error < report.rtn_output_error
    assert np.isfinite(solution.weight.dequantize()).all()


def test_a_definite_hessian_keeps_the_wanted_damping():
    problem = make(16, 200, 400)
    report = solve(
        problem.weight_RC, problem.hessian, GPTQScheme(group_size=-1, hessian_damping=0.0)
    ).report
    assert report.damping == 0
    assert "raised" not in report.reason


@pytest.mark.parametrize("size", [32, 600])
def test_a_gram_that_no_damping_makes_definite_is_rounded_to_nearest(size):
    # A positive diagonal, but Cauchy-Schwarz broken: no sum of xᵀx.
    gram = np.eye(size, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 5.0
    weight = np.random.default_rng(0).standard_normal((8, size)).astype(np.float32)
    solution = solve(weight, HessianSum(gram, 10), GPTQScheme(group_size=16))
    report, restored = solution.report, solution.weight.dequantize()
    assert report.kept == "rtn"
    assert "indefinite" in report.reason
    assert report.rtn_rows == 8
    assert np.isfinite([report.weight_error, report.output_error]).all()
    assert report.output_error == report.rtn_output_error
    assert np.isfinite(restored).all()
    assert np.abs(weight - restored).max() < 0.5
