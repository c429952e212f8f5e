"""A layer that its block calls several times is calibrated on the inputs of all these calls."""

from __future__ import annotations

from typing import Any

import jax
import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.blocks import find_blocks
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import Skeleton
from pipeline.planning.make_plan import make_plan
from pipeline.storage.object_store import open_store
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.worker import Worker
from quantizer import HessianSum
from quantizer.schemes import GPTQScheme
from tests.families.tiny_families import shared_family
from tests.integration.quantized import recipe
from tests.pipeline.artifacts import load
from tests.pipeline.tiny_runs import captured


@pytest.mark.exhaustive
def test_the_gram_is_the_sum_over_both_calls() -> None:
    """DeBERTa's query and key take hidden states, and then positions relative to each other."""
    preset = shared_family("DebertaV3")
    given = make_plan(
        read_preset(str(preset)), recipe(GPTQScheme(weight_bits=4, group_size=16)), threads=1
    )
    assert given.windows is not None
    part = given.plan.parts[1]
    assert [tuple(name.rpartition("/")[2] for name in g.targets) for g in part.groups[:2]] == [
        ("query", "key"),
        ("value",),
    ]

    store = open_store("memory://test-repeated-calls")
    store.put(given.windows.key, given.windows.to_bytes())
    worker = Worker(given.plan, str(preset), store.root_url)
    worker.restore(0, range(len(given.plan.tokens.shards)), 0)  # type: ignore[union-attr]
    values = worker.read(1)
    seen = stock_inputs(load(preset, "float32"), part.groups[0].targets[1], given.windows.tokens)
    assert [inputs.shape[1] for inputs in seen] == [given.windows.tokens.shape[1], 32]
    for stage, inputs in enumerate((seen, seen[:1])):
        rows = np.concatenate([rows.reshape(-1, 32) for rows in inputs])
        found = captured(worker, 0, stage, range(1), values)
        assert isinstance(found, HessianSum)
        assert found.num_rows == len(rows)
        np.testing.assert_allclose(found.gram_CC, rows.T @ rows, rtol=1e-4, atol=1e-3)


def stock_inputs(task: Any, name: str, tokens: NDArray[np.int32]) -> list[NDArray[np.float64]]:
    """The inputs of each call of a layer in the first block of stock Keras."""
    path = f"{task.backbone.transformer_layers[0].path}/{name}"
    [layer] = [layer for layer in task.backbone._flatten_layers() if layer.path == path]
    seen = []

    def call(inputs: Any, **kwargs: Any) -> Any:
        seen.append(np.asarray(inputs, np.float64))
        return type(layer).call(layer, inputs, **kwargs)

    object.__setattr__(layer, "call", call)
    task.backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return seen


class Again(keras.layers.Layer):  # type: ignore[misc]  # Keras carries no types
    """Calls its layer on its own output."""

    def __init__(self) -> None:
        super().__init__(name="again")
        self.inner = keras.layers.Dense(8, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)

    def call(self, inputs: Any) -> Any:
        return self.inner(self.inner(inputs))


def test_a_layer_that_is_called_on_its_own_output_cannot_be_calibrated() -> None:
    tokens = keras.Input((None, 8), name="hidden")
    backbone = keras.Model(tokens, Again()(tokens))
    skeleton = Skeleton(backbone=backbone, task=None, backbone_json={}, task_json=None)
    [block] = find_blocks(skeleton).blocks
    inputs = [jax.ShapeDtypeStruct((2, 4, 8), np.float32)]
    with pytest.raises(SourceError, match="again/inner: called again on what was computed with it"):
        BlockProgram(block, {"inner": "hessian"}, inputs)
    assert BlockProgram(block, {"inner": None}, inputs).groups == ()
