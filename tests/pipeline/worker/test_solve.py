"""Layers are solved together or alone with the same result; what cannot be calibrated is said."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from pipeline.canonical import canonical_json
from pipeline.plan import LayerPlan
from pipeline.worker.model_state import ModelState
from pipeline.worker.solve import SolvedLayer, solve_layers
from quantizer import HessianSum, MagnitudeSum
from quantizer.errors import CalibrationError
from tests.pipeline.tiny_runs import model_state, planned, source

IN_FEATURES = 64


@cache
def state(scheme: str) -> ModelState:
    return model_state(planned(scheme).plan.to_json(), str(source()))


def layers_of(scheme: str) -> list[LayerPlan]:
    """Query, key and value of block 0."""
    part = planned(scheme).plan.parts[1]
    names = ("query", "key", "value")
    return [layer for layer in part.layers if layer.name.rpartition("/")[2] in names]


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, IN_FEATURES)).astype(np.float32)


def solve(scheme: str, layers: list[LayerPlan], sums: Any) -> list[SolvedLayer]:
    model = state(scheme)
    return solve_layers(model.targets(1), layers, model.read(1), sums)


def test_layers_of_one_input_are_solved_as_each_alone() -> None:
    layers = layers_of("gptq")
    assert len(layers) == 3
    sums = HessianSum.of(inputs())
    together = solve("gptq", layers, sums)
    for layer, one in zip(layers, together, strict=True):
        [alone] = solve("gptq", [layer], sums)
        assert one.path == alone.path == layer.path
        assert one.report == alone.report
        for name, value in one.variables.items():
            assert np.array_equal(value, alone.variables[name])
        assert one.kernel is not None
        assert alone.kernel is not None
        assert np.array_equal(one.kernel, alone.kernel)


@pytest.mark.parametrize("problem", ["nan", "infinity", "zero", "huge"])
@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_what_cannot_be_calibrated_is_rounded_and_said(scheme: str, problem: str) -> None:
    gram = inputs().T @ inputs()
    gram[3, 3] = {"nan": np.nan, "infinity": np.inf, "zero": 0, "huge": 1e30}[problem]
    if problem == "zero":
        gram[:] = 0
    sums: Any = HessianSum(gram, 400)
    if scheme == "awq":
        diagonal = np.ascontiguousarray(gram.diagonal())
        sums = MagnitudeSum(np.sqrt(diagonal), diagonal, np.sqrt(diagonal), 400)
    layers = layers_of(scheme)
    for solved in solve(scheme, layers, sums):
        assert solved.report["kept"] == "rtn"
        assert "rounded to nearest" in solved.report["reason"]
        assert layers[0].path in solved.report["reason"]
        assert solved.report["output_error"] is None
        assert 0 < solved.report["weight_error"] < 0.2
        assert solved.kernel is not None
        assert np.isfinite(solved.kernel).all()
        assert json.loads(canonical_json(solved.report)) == solved.report


def test_float8_needs_to_know_its_inputs() -> None:
    sums = MagnitudeSum.of(inputs())
    damaged = MagnitudeSum(sums.sum_abs_C, sums.sum_square_C, sums.max_abs_C * np.nan, 400)
    with pytest.raises(CalibrationError, match="query"):
        solve("float8", layers_of("float8"), damaged)
