"""Experts that share an input are solved as one matrix, others in ranges; errors name them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.model.preset import read_preset
from pipeline.model.targets import Target
from pipeline.plan import LayerPlan, Plan
from pipeline.planning.make_plan import make_plan
from pipeline.run.solved_layers import SolvedLayer
from pipeline.worker.model_state import ModelState
from pipeline.worker.solve import join_layer, solve_layers, solve_slices
from quantizer import HessianSum, solve
from quantizer.errors import WeightError
from quantizer.experts import ExpertHessians
from quantizer.result import GroupedWeight
from quantizer.schemes import GPTQScheme, Int8Scheme
from tests.families.tiny_families import shared_family
from tests.integration.quantized import recipe

SCHEME = GPTQScheme(weight_bits=3, group_size=16, scale_search=False)


@cache
def planned() -> tuple[Plan, ModelState]:
    source = shared_family("Mixtral")
    plan = make_plan(read_preset(str(source)), recipe(SCHEME), threads=1).plan
    return plan, ModelState(plan, str(source))


def bank(name: str) -> tuple[Target, LayerPlan, dict[str, NDArray[Any]]]:
    """A bank of block 0, and the block's values."""
    plan, model = planned()
    [layer] = (layer for layer in plan.parts[1].layers if layer.name.endswith(name))
    return model.targets(1)[layer.path], layer, model.read(1)


def hessian(in_features: int, seed: int, number: int = 400) -> HessianSum:
    rng = np.random.default_rng(seed)
    mixing = np.eye(in_features) + 0.2 * rng.normal(size=(in_features, in_features))
    return HessianSum.of((rng.normal(size=(number, in_features)) @ mixing).astype(np.float32))


def assert_same(one: SolvedLayer, other: SolvedLayer) -> None:
    assert one.report == other.report
    assert one.codes is not None
    assert other.codes is not None
    np.testing.assert_array_equal(one.codes.codes_ERC, other.codes.codes_ERC)
    np.testing.assert_array_equal(one.codes.scale_ERG, other.codes.scale_ERG)
    np.testing.assert_array_equal(one.codes.zero_ERG, other.codes.zero_ERG)


def test_experts_that_share_an_input_are_solved_as_one_matrix() -> None:
    target, layer, values = bank("expert_feedforward_gate_dense")
    statistics = hessian(layer.in_features, 0)
    [whole] = solve_layers({layer.path: target}, [layer], values, statistics)
    assert whole.codes is not None
    kernel = values[layer.path]
    for number in range(layer.experts):
        alone = solve(kernel[number].T, statistics, SCHEME).weight
        assert isinstance(alone, GroupedWeight)
        np.testing.assert_array_equal(whole.codes.codes_ERC[number], alone.codes_RC)
    parts = [solve_slices(target, layer, values, statistics, [n]) for n in range(layer.slices)]
    assert_same(join_layer(target, layer, values, parts[::-1]), whole)


def test_experts_with_inputs_of_their_own_are_solved_in_any_ranges() -> None:
    target, layer, values = bank("expert_feedforward_output_dense")
    sums = [hessian(layer.in_features, seed) for seed in range(layer.experts)]
    rows_E = np.array([one.num_rows for one in sums])
    every = ExpertHessians(np.stack([np.asarray(one.gram_CC) for one in sums]), rows_E)
    assert layer.slices == layer.experts == 4
    whole = join_layer(
        target, layer, values, [solve_slices(target, layer, values, every, range(4))]
    )
    late = ExpertHessians(every.gram_ECC[2:], every.rows_E[2:], 2)
    parts = [
        solve_slices(target, layer, values, late, [3]),
        solve_slices(target, layer, values, every, [0, 1]),
        solve_slices(target, layer, values, late, [2]),
    ]
    assert_same(join_layer(target, layer, values, parts), whole)
    for number, one in enumerate(sums):
        alone = solve(values[layer.path][number].T, one.shrunk(1), SCHEME).weight
        assert isinstance(alone, GroupedWeight)
        assert whole.codes is not None
        np.testing.assert_array_equal(whole.codes.codes_ERC[number], alone.codes_RC)


@pytest.mark.parametrize(
    "name", ["expert_feedforward_gate_dense", "expert_feedforward_output_dense"]
)
@pytest.mark.parametrize("scheme", [SCHEME, Int8Scheme()], ids=["gptq", "int8"])
def test_a_weight_that_is_nan_is_refused_by_layer_and_expert(name: str, scheme: Any) -> None:
    target, layer, values = bank(name)
    layer = dataclasses.replace(layer, scheme=scheme)
    kernel = values[layer.path].copy()
    kernel[2, 5, 7] = np.nan
    values = values | {layer.path: kernel}
    unit_CC = np.eye(layer.in_features, dtype=np.float32)

    def refused() -> None:
        if scheme is SCHEME and name == "expert_feedforward_output_dense":
            sums = ExpertHessians(np.stack([unit_CC] * 4), np.full(4, 99))
            solve_slices(target, layer, values, sums, range(4))
        else:
            statistics = HessianSum(unit_CC, 99) if scheme is SCHEME else None
            solve_layers({layer.path: target}, [layer], values, statistics)

    with pytest.raises(WeightError, match=f"{layer.path}, expert 2: 1 of 2048 weights are NaN"):
        refused()


def test_what_cannot_be_calibrated_is_rounded_and_named() -> None:
    target, layer, values = bank("expert_feedforward_gate_dense")
    found = hessian(layer.in_features, 0)
    gram_CC = np.array(found.gram_CC)
    gram_CC[3, 3] = np.inf
    statistics = HessianSum(gram_CC, found.num_rows)
    [solved] = solve_layers({layer.path: target}, [layer], values, statistics)
    assert solved.report["kept"] == "rtn"
    assert solved.report["rtn_rows"] == layer.experts * layer.out_features
    assert f"not calibrated, rounded to nearest: {layer.path}" in solved.report["reason"]
