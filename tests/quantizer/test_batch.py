"""Problems solved as one program are solved as well as one by one."""

import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, QuantizationError, solve, solve_batch

SCHEME = GPTQScheme(weight_bits=3, group_size=32, activation_order=True)


def problems(count, rows=200):
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(40, 70)).astype("float32") for _ in range(count)]
    mixing = rng.normal(size=(count, 70, 70))
    hessians = [HessianSum.of(rng.normal(size=(rows, 70)) @ mix) for mix in mixing]
    return weights, hessians


def test_a_batch_is_solved_as_well_as_its_problems_alone():
    weights, hessians = problems(3)
    for weight, hessian, together in zip(
        weights, hessians, solve_batch(weights, hessians, SCHEME), strict=True
    ):
        alone = solve(weight, hessian, SCHEME)
        assert np.mean(together.weight.codes_RC == alone.weight.codes_RC) >= 0.999
        assert together.account.output_error == pytest.approx(alone.account.output_error, rel=1e-3)
        assert together.account.damping == SCHEME.hessian_damping


def test_a_problem_that_needs_more_damping_is_solved_alone():
    weights, hessians = problems(2)
    _, (_, singular) = problems(2, rows=20)
    scheme = GPTQScheme(weight_bits=4, group_size=32, hessian_damping=0.0)
    good, raised = solve_batch(weights, [hessians[0], singular], scheme)
    assert good.account.damping == 0
    assert raised.account.damping > 0
    expected = solve(weights[1], singular, scheme)
    np.testing.assert_array_equal(raised.weight.codes_RC, expected.weight.codes_RC)


def test_weights_of_two_shapes_are_refused_by_name():
    weights, hessians = problems(2)
    with pytest.raises(QuantizationError, match=r"query.*one shape"):
        solve_batch([weights[0], weights[1][:8]], hessians, SCHEME, names=["query", "key"])


def test_a_bad_hessian_is_refused_by_name():
    weights, hessians = problems(2)
    empty = HessianSum(np.zeros((70, 70), "float32"), 0)
    with pytest.raises(QuantizationError, match="key"):
        solve_batch(weights, [hessians[0], empty], SCHEME, names=["query", "key"])


def test_an_empty_batch_has_no_solutions():
    assert solve_batch([], [], SCHEME) == []
