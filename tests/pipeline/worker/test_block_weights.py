"""A block's weights are sent to the device once, and depend on nothing but what is asked for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from pipeline.plan import LayerPlan, Plan
from pipeline.run.solved_layers import SolvedLayer
from pipeline.storage.object_store import open_store
from pipeline.worker import block_weights
from pipeline.worker.block_weights import BlockWeights
from pipeline.worker.devices import Devices
from pipeline.worker.model_state import ModelState, place_weights
from pipeline.worker.solve import solve_layers
from quantizer import kernel_layout
from quantizer.keras_format.variables import decode_kernel
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    QuickWorker,
    execute,
    model_state,
    planned,
    source,
)


class Sent:
    """Counts what goes to the device: arrays of the source, and layers as they are stored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.placed: list[str] = []
        self.decoded = 0
        place, decode = block_weights.place_weights, block_weights.decode_on_device

        def placing(variables: Sequence[Any], values: Any) -> Any:
            self.placed += [variable.path for variable in variables]
            return place(variables, values)

        def decoding(*args: Any) -> Any:
            self.decoded += 1
            return decode(*args)

        monkeypatch.setattr(block_weights, "place_weights", placing)
        monkeypatch.setattr(block_weights, "decode_on_device", decoding)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def state(scheme: str) -> ModelState:
    return model_state(planned(scheme).plan.to_json(), str(source()))


def solved(block: int) -> dict[str, SolvedLayer]:
    """A block's layers, rounded to nearest."""
    plan, model = planned("int8").plan, state("int8")
    layers = schemed(plan, block)
    found = solve_layers(model.targets(block + 1), layers, model.read(block + 1), None)
    return {layer.path: layer for layer in found}


def schemed(plan: Plan, block: int) -> list[LayerPlan]:
    return [layer for layer in plan.parts[block + 1].layers if layer.scheme]


def test_a_run_sends_each_array_once_and_then_the_layers_that_are_solved(
    sent: Sent, tmp_path: Path
) -> None:
    given, store = planned("float8"), open_store(str(tmp_path))
    execute(given, store)
    plan, model = given.plan, state("float8")
    sizes = [len(block.layer.weights) for block in model.graph.blocks]
    assert max(Counter(sent.placed).values()) == 1
    assert len(sent.placed) == sum(sizes) > 0
    # The layers of the last group are needed by no later stage of the last block.
    solved = sum(len(schemed(plan, block)) for block in range(NUM_BLOCKS))
    assert sent.decoded == solved - len(plan.parts[NUM_BLOCKS].groups[-1].targets)

    # A worker that comes later is sent what is stored of the layers, and never their float kernels.
    sent.placed, sent.decoded = [], 0
    worker = QuickWorker(plan, str(source()), store.root_url)
    worker.restore(2, [0, 1], 0)
    kernels = {
        model.targets(block + 1)[layer.path].kernel_path
        for block in (0, 1)
        for layer in schemed(plan, block)
    }
    assert sent.decoded == len(kernels)
    assert not kernels.intersection(sent.placed)
    assert len(sent.placed) == sum(sizes[:2]) - len(kernels)


def test_float_kernels_are_gone_from_all_devices_before_codes_take_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, stored = state("int8"), {path: x.variables for path, x in solved(0).items()}
    values, variables = model.read(1), model.graph.blocks[0].layer.weights
    held = BlockWeights(model, Devices(jax.devices() * 3))
    kernels = {model.targets(1)[path].kernel_path for path in stored}
    arrays = [weakref.ref(a) for one in held.on_each(0, values, {}) for a in one]
    paths = [variable.path for variable in variables] * 3
    left: list[int] = []
    decode = block_weights.decode_on_device

    def decoding(*args: Any) -> Any:
        known = zip(paths, arrays, strict=True)
        left.append(sum(array() is not None for path, array in known if path in kernels))
        return decode(*args)

    monkeypatch.setattr(block_weights, "decode_on_device", decoding)
    held.on_each(0, values, stored)
    assert left == [0] * len(kernels)


def test_weights_depend_on_the_block_and_what_is_solved_alone(sent: Sent) -> None:
    plan, model = planned("int8").plan, state("int8")
    by_block = {block: {p: x.variables for p, x in solved(block).items()} for block in (0, 1)}
    values = {block: model.read(block + 1) for block in by_block}
    held = BlockWeights(model, Devices.of_this_process())
    everything = len(by_block[0])
    assert everything > 3
    for block, count in [(0, 0), (0, 3), (0, 3), (0, 1), (1, 2), (0, everything), (0, 0)]:
        chosen = {path: by_block[block][path] for path in list(by_block[block])[:count]}
        found = held.of(block, values[block], chosen)
        expected = BlockWeights(model, Devices.of_this_process()).of(block, values[block], chosen)
        variables = model.graph.blocks[block].layer.weights
        kernels = {model.targets(block + 1)[path].kernel_path: path for path in chosen}
        for variable, one, other in zip(variables, found, expected, strict=True):
            assert one.dtype == variable.dtype
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            plain = values[block][variable.path]
            if variable.path in kernels:
                path = kernels[variable.path]
                target = model.targets(block + 1)[path]
                scheme = next(x.scheme for x in schemed(plan, block) if x.path == path)
                assert scheme is not None
                plain = decode_kernel(chosen[path], kernel_layout(target.layer), scheme)
            np.testing.assert_array_equal(one, plain)


def test_a_block_that_is_left_takes_no_room() -> None:
    model = state("int8")
    held, values = BlockWeights(model, Devices.of_this_process()), model.read(1)
    before = sum(array.nbytes for array in jax.live_arrays())
    held.of(0, values, {})
    size = sum(array.nbytes for array in values.values())
    assert sum(array.nbytes for array in jax.live_arrays()) == before + size
    held.free()
    assert sum(array.nbytes for array in jax.live_arrays()) == before


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_as_numpy_does(stored: str, wanted: str) -> None:
    class Variable:
        path, dtype = "weight", wanted

    rng = np.random.default_rng(0)
    value = (rng.normal(size=(7, 11)) * np.exp(rng.normal(size=(7, 11), scale=4))).astype(stored)
    value[0, :3] = [0.0, -0.0, ml_dtypes.finfo(stored).max]
    with np.errstate(over="ignore"):
        [found] = place_weights([Variable()], {"weight": value})
        assert np.asarray(found).tobytes() == value.astype(wanted).tobytes()


def test_what_travels_of_a_layer_is_what_is_stored_of_it() -> None:
    """At 8 bits a quarter of the float kernel, and a scale for each output."""
    model = state("int8")
    for path, layer in solved(0).items():
        target = model.targets(1)[path]
        kernel_bytes = 4 * target.in_features * target.out_features
        sent_bytes = sum(array.nbytes for array in layer.variables.values())
        assert sent_bytes == kernel_bytes / 4 + 4 * target.out_features
