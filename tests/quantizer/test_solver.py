"""The one door: whatever the scheme, a layer is validated once and made a matrix once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quantizer import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    HessianSum,
    Int4Scheme,
    Int8Scheme,
    MagnitudeSum,
    SchemeError,
    UnusableStatisticsError,
    kernel_layout,
    quantize_layer,
    row_slices,
    solve,
    solve_stack,
    solver,
)
from quantizer.gptq import solve as gptq
from quantizer.gptq.solved_rows import join_slices
from quantizer.keras_format.kernel_layout import KernelLayout
from tests.selection import covering
from tests.stock import kernel_layer

SCHEMES = {
    "gptq": GPTQScheme(group_size=8),
    "awq": AWQScheme(group_size=8, num_grid_points=2),
    "int8": Int8Scheme(),
    "int4": Int4Scheme(block_size=8),
    "float8": Float8Scheme(),
}


@pytest.fixture
def calls(monkeypatch):
    """How often each step is taken."""
    counted = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counting(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(solver, "_checked_weight")
    count(solver, "share_input")
    count(KernelLayout, "to_matrix")
    count(HessianSum, "check")
    count(MagnitudeSum, "check")
    return counted


def statistics_of(scheme, layer, inputs):
    kind = MagnitudeSum if scheme.mode == "float8" else HessianSum
    return kind.of(kernel_layout(layer).flatten_inputs(np.repeat(inputs, 4, axis=0)))


@pytest.mark.parametrize(
    ("mode", "form"), covering(SCHEMES, ["dense", "llama output", "gemma query"])
)
def test_a_layer_is_validated_and_transposed_once(mode, form, calls):
    layer, inputs = kernel_layer(form)
    statistics = statistics_of(SCHEMES[mode], layer, inputs)
    quantize_layer(layer, SCHEMES[mode], statistics)
    factorized = {"share_input": 1} if mode == "gptq" else {}
    assert calls == {"_checked_weight": 1, "check": 1, "to_matrix": 1} | factorized


def test_a_stack_shares_one_check_and_one_factor(calls):
    weights = np.random.default_rng(0).normal(size=(3, 8, 32)).astype(np.float32)
    hessian = HessianSum.of(np.random.default_rng(1).normal(size=(64, 32)))
    solve_stack(list(weights), hessian, SCHEMES["gptq"])
    assert calls == {"_checked_weight": 3, "check": 1, "share_input": 1}


@pytest.mark.parametrize("mode", SCHEMES)
def test_a_stack_in_any_scheme_equals_its_layers(mode):
    scheme = SCHEMES[mode]
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(rows, 32)).astype(np.float32) for rows in (8, 5)]
    kind = MagnitudeSum if mode == "float8" else HessianSum
    statistics = kind.of(rng.normal(size=(64, 32)))
    for weight, result in zip(weights, solve_stack(weights, statistics, scheme), strict=True):
        alone = solve(weight, statistics, scheme)
        assert result.report == alone.report
        np.testing.assert_array_equal(result.weight.dequantize(), alone.weight.dequantize())


def test_row_slices_join_to_the_whole(monkeypatch):
    monkeypatch.setattr(gptq, "_LARGEST_SLICE", 32)
    weight = np.random.default_rng(0).normal(size=(70, 32)).astype(np.float32)
    hessian = HessianSum.of(np.random.default_rng(1).normal(size=(64, 32)))
    scheme = SCHEMES["gptq"]
    assert len(row_slices(*weight.shape)) == 3
    layer = solver.check_layer(weight, scheme)
    last, first = solver.solve_rows(layer, hessian, [2]), solver.solve_rows(layer, hessian, [0, 1])
    joined, whole = (
        join_slices(weight, [*first, *last], scheme),
        solve(weight, hessian, scheme),
    )
    assert joined.report == whole.report
    np.testing.assert_array_equal(joined.weight.codes_RC, whole.weight.codes_RC)


def test_unusable_statistics_can_be_told_from_missing_ones():
    weight, scheme = np.ones((4, 32), np.float32), SCHEMES["gptq"]
    with pytest.raises(UnusableStatisticsError, match="query"):
        solve(weight, HessianSum(np.zeros((32, 32), np.float32), 3), scheme, name="query")
    with pytest.raises(ValueError, match="query") as caught:
        solve(weight, None, scheme, name="query")
    assert not isinstance(caught.value, UnusableStatisticsError | SchemeError)
