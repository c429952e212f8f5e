"""Tensors of single experts are found in what a converter stacks of them, whatever their names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ExportError
from pipeline.model.expert_tensors import (
    ExpertTensor,
    expert_tensors,
    is_of_one_expert,
    of_any_expert,
    recorded_tensor,
)

EXPERTS, INPUTS, OUTPUTS = 3, 4, 10


def refuse(name: str) -> ExportError:
    return ExportError(f"computes with {name}")


def tensor(name: str) -> Any:
    return recorded_tensor(name, refuse)


def stacked(convert: Any, *names: str) -> dict[str, ExpertTensor]:
    parts = [convert(*(tensor(f"{i}.{name}") for name in names)) for i in range(EXPERTS)]
    value: Any = np.stack(parts, axis=0)
    return expert_tensors("block/bank", (EXPERTS, INPUTS, OUTPUTS), value.step, refuse)


def test_transposed_and_joined_tensors_are_found_in_the_variable() -> None:
    def convert(gate: Any, up: Any) -> Any:
        return np.concatenate([np.transpose(gate, axes=(1, 0)), np.transpose(up)], axis=-1)

    found = stacked(convert, "gate", "up")
    assert found.keys() == {f"{i}.{name}" for i in range(EXPERTS) for name in ("gate", "up")}
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=one.shape) for name, one in found.items()}
    variable = np.stack(
        [convert(values[f"{i}.gate"], values[f"{i}.up"]) for i in range(EXPERTS)], axis=0
    )
    assert variable.shape == (EXPERTS, INPUTS, OUTPUTS)
    for name, one in found.items():
        assert one.variable == "block/bank"
        np.testing.assert_array_equal(one.of(variable), values[name])


def test_the_order_of_joined_tensors_is_that_of_the_converter() -> None:
    found = stacked(
        lambda gate, up: np.concatenate([np.transpose(up), np.transpose(gate)], axis=1),
        *("gate", "up"),
    )
    assert (found["1.up"].start, found["1.up"].stop) == (0, 5)
    assert (found["1.gate"].start, found["1.gate"].stop) == (5, 10)


@pytest.mark.parametrize(
    "convert",
    [
        lambda gate: gate,
        lambda gate: np.reshape(gate, (INPUTS, OUTPUTS)),
        lambda gate: np.multiply(gate, 2),
        lambda gate: np.asarray(gate),
    ],
    ids=["not transposed", "reshaped", "computed with", "read"],
)
def test_what_is_not_moved_so_is_refused(convert: Any) -> None:
    with pytest.raises((ExportError, TypeError)):
        stacked(convert, "gate")


def test_interleaved_tensors_are_refused() -> None:
    def convert(gate: Any, up: Any) -> Any:
        pairs = np.stack([np.transpose(gate), np.transpose(up)], axis=2)
        return np.reshape(pairs, (INPUTS, OUTPUTS))

    with pytest.raises(ExportError, match=r"computes with 0.gate"):
        stacked(convert, "gate", "up")


def test_one_pattern_names_the_same_module_of_all_experts() -> None:
    pattern = of_any_expert("model.layers.7.mlp.experts.12.gate_proj")
    assert re.search(pattern, "model.layers.7.mlp.experts.0.gate_proj")
    assert not re.search(pattern, "model.layers.71.mlp.experts.0.gate_proj")
    assert not re.search(pattern, "model.layers.7.mlp.experts.0.up_proj")
    assert not re.search(pattern, "model.layers.7.mlp.shared_experts.gate_proj")
    assert is_of_one_expert("model.layers.7.mlp.experts.12.gate_proj.weight")
    assert not is_of_one_expert("model.layers.7.mlp.experts.gate_up_proj")
