"""Layers are solved together or alone with equal results; reports name what was not calibrated."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

from pipeline.canonical import canonical_json
from pipeline.plan import LayerPlan
from pipeline.run.solved_layers import SolvedLayer
from pipeline.worker.model_state import ModelState
from pipeline.worker.solve import solve_layers
from quantizer import HessianSum, MagnitudeSum, kernel_layout, solver
from quantizer.errors import CalibrationError
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.variables import decode_kernel
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


def solve(scheme: str, layers: list[LayerPlan], statistics: Any) -> list[SolvedLayer]:
    model = state(scheme)
    return solve_layers(model.targets(1), layers, model.read(1), statistics)


def test_layers_of_one_input_are_solved_as_each_alone() -> None:
    layers = layers_of("gptq")
    assert len(layers) == 3
    statistics = HessianSum.of(inputs())
    together = solve("gptq", layers, statistics)
    for layer, one in zip(layers, together, strict=True):
        [alone] = solve("gptq", [layer], statistics)
        assert one.path == alone.path == layer.path
        assert one.report == alone.report
        for name, value in one.variables.items():
            assert np.array_equal(value, alone.variables[name])


def test_each_layer_is_validated_and_made_a_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(solver, "_checked_weight")
    count(solver, "share_input")
    count(KernelLayout, "to_matrix")
    count(HessianSum, "check")
    solve("gptq", layers_of("gptq"), HessianSum.of(inputs()))
    assert Counter(calls) == {
        "_checked_weight": 3,
        "to_matrix": 3,
        "check": 1,
        "share_input": 1,
    }


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [("gptq", "nan"), ("gptq", "infinity"), ("gptq", "zero"), ("gptq", "huge"), ("awq", "nan")],
)
def test_what_cannot_be_calibrated_is_rounded_and_reported(scheme: str, problem: str) -> None:
    gram = inputs().T @ inputs()
    gram[3, 3] = {"nan": np.nan, "infinity": np.inf, "zero": 0, "huge": 1e30}[problem]
    if problem == "zero":
        gram[:] = 0
    statistics: Any = HessianSum(gram, 400)
    if scheme == "awq":
        diagonal = np.ascontiguousarray(gram.diagonal())
        statistics = MagnitudeSum(np.sqrt(diagonal), diagonal, np.sqrt(diagonal), 400)
    layers = layers_of(scheme)
    for solved in solve(scheme, layers, statistics):
        assert solved.report["kept"] == "rtn"
        assert "rounded to nearest" in solved.report["reason"]
        assert layers[0].path in solved.report["reason"]
        assert solved.report["output_error"] is None
        assert 0 < solved.report["weight_error"] < 0.2
        target, scheme_of_layer = state(scheme).targets(1)[solved.path], layers[0].scheme
        assert scheme_of_layer is not None
        kernel = decode_kernel(solved.variables, kernel_layout(target.layer), scheme_of_layer)
        assert np.isfinite(kernel).all()
        assert json.loads(canonical_json(solved.report)) == solved.report


def test_float8_needs_its_inputs() -> None:
    known = MagnitudeSum.of(inputs())
    damaged = MagnitudeSum(known.sum_abs_C, known.sum_square_C, known.max_abs_C * np.nan, 400)
    with pytest.raises(CalibrationError, match="query"):
        solve("float8", layers_of("float8"), damaged)
