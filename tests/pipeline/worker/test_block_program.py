"""Captured statistics are those of the layers' real inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.storage.object_store import open_store
from pipeline.worker.model_state import ModelState
from pipeline.worker.worker import Worker
from quantizer import HessianSum, MagnitudeSum, kernel_layout
from tests.pipeline.presets import stock_task
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    QuickWorker,
    captured,
    execute,
    model_state,
    planned,
    recipe,
    source,
)
from tests.selection import by_default

DOCUMENTS = [f"document {i}: " + "some more words about it, " * (i % 5) for i in range(7)]


def padded_plan(scheme: str, architecture: str, folder: Path) -> Planned:
    """Windows of one short document each, so that most end in padding."""
    paths = []
    for index, document in enumerate(DOCUMENTS):
        path = folder / f"{index}.txt"
        path.write_text(document)
        paths.append(str(path))
    wanted = recipe(scheme, texts=paths, num_samples=len(paths), sequence_length=48, packing=False)
    return make_plan(read_preset(str(source(architecture))), wanted, threads=2)


def worker_for(given: Planned, architecture: str, name: str) -> Worker:
    store = open_store(f"memory://test-forward/{name}")
    assert given.windows is not None
    store.put(given.windows.key, given.windows.to_bytes())
    return QuickWorker(given.plan, str(source(architecture)), store.root_url)


@contextmanager
def recording(layers: dict[str, Any]) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Record the layers' inputs, by path, as rows of in_features."""
    seen: dict[str, NDArray[np.float64]] = {}

    def record(path: str, layer: Any) -> Any:
        call = type(layer).call

        def recorded(inputs: Any, **kwargs: Any) -> Any:
            axes = kernel_layout(layer).input_axes
            moved = np.moveaxis(np.asarray(inputs, np.float64), axes, range(-len(axes), 0))
            seen[path] = moved.reshape(*moved.shape[: -len(axes)], -1)
            return call(layer, inputs, **kwargs)

        return recorded

    for path, layer in layers.items():
        object.__setattr__(layer, "call", record(path, layer))
    try:
        yield seen
    finally:
        for layer in layers.values():
            object.__delattr__(layer, "call")


@pytest.mark.parametrize(
    "architecture", by_default(["Llama3", "Gemma", "GPT2", "Bert"], ["Llama3"])
)
def test_captured_grams_are_those_of_the_inputs_in_stock_keras(
    architecture: str, tmp_path: Path
) -> None:
    given = padded_plan("gptq", architecture, tmp_path)
    worker = worker_for(given, architecture, architecture)
    assert given.windows is not None
    tokens, mask = given.windows.tokens, given.windows.mask
    assert not mask.all()

    backbone = stock_task(architecture, num_blocks=NUM_BLOCKS).backbone
    inputs = {
        "token_ids": tokens,
        "padding_mask": mask.astype(np.int32),
        "segment_ids": np.zeros_like(tokens),
    }
    wanted = {layer.path for part in given.plan.parts[1:] for layer in part.layers if layer.scheme}
    by_path = {layer.path: layer for layer in backbone._flatten_layers()}
    layers = {path: by_path[path] for path in wanted}
    with recording(layers) as seen:
        backbone({name: inputs[name] for name in backbone.input})

    worker.restore(0, [0], 0)
    for block, part in enumerate(given.plan.parts[1:]):
        values = worker.read(block + 1)
        paths = {layer.name: layer.path for layer in part.layers}
        assert {name for g in part.groups for name in g.targets} == {
            layer.name for layer in part.layers if layer.scheme
        }
        for stage, group in enumerate(part.groups):
            found = captured(worker, block, stage, range(1), values)
            assert isinstance(found, HessianSum)
            assert found.num_rows == mask.sum()
            for name in group.targets:
                rows = seen[paths[name]][mask]
                expected = rows.T @ rows
                scale = np.abs(expected).max()
                np.testing.assert_allclose(found.gram_CC, expected, atol=3e-5 * scale, rtol=0)
        worker.propagate(block, [0], values)


def test_magnitudes_leave_padding_out(tmp_path: Path) -> None:
    given = padded_plan("float8", "Llama3", tmp_path)
    worker = worker_for(given, "Llama3", "magnitudes")
    assert given.windows is not None
    mask = given.windows.mask
    backbone = stock_task("Llama3", num_blocks=NUM_BLOCKS).backbone
    by_path = {layer.path: layer for layer in backbone._flatten_layers()}
    query = by_path["transformer_layer_0/self_attention/query"]
    with recording({"query": query}) as seen:
        backbone({"token_ids": given.windows.tokens, "padding_mask": mask.astype(np.int32)})
    worker.restore(0, [0], 0)
    found = captured(worker, 0, 0, range(1), worker.read(1))
    assert isinstance(found, MagnitudeSum)
    assert found.num_rows == mask.sum()
    rows = np.abs(seen["query"][mask])
    np.testing.assert_allclose(found.max_abs_C, rows.max(0), rtol=1e-5)
    np.testing.assert_allclose(found.sum_abs_C, rows.sum(0), rtol=1e-5)


def test_layers_that_share_an_input_share_a_group() -> None:
    for part in planned("gptq").plan.parts[1:]:
        assert [group.targets for group in part.groups] == [
            ("self_attention/query", "self_attention/key", "self_attention/value"),
            ("self_attention/attention_output",),
            ("feedforward_gate_dense", "feedforward_intermediate_dense"),
            ("feedforward_output_dense",),
        ]
        assert [group.in_features for group in part.groups] == [64, 64, 64, 128]


def test_blocks_of_one_signature_are_compiled_once() -> None:
    given = planned("gptq")
    state: ModelState = model_state(given.plan.to_json(), str(source()))
    execute(given, open_store("memory://test-forward/once"), workers=2)
    execute(given, open_store("memory://test-forward/twice"), workers=1)
    assert len({block.signature for block in state.graph.blocks}) == 1
    [program] = state._programs.values()
    assert [stage.run._cache_size() for stage in program._stages] == [1] * 5
