"""A worker knows its device's memory, and says what to do where it is too small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pipeline.executor.protocol import ExecutorError, Handle
from pipeline.planning import estimates
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.block_weights import BlockWeights
from pipeline.worker.device_memory import device_errors, device_memory
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import QuickWorker, planned, source


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path))


def test_a_cpu_does_not_say_how_much_there_is() -> None:
    found = device_memory()
    assert (found.kind, found.num_bytes) == ("cpu", None)
    assert found.node


def test_an_allocation_that_fails_says_what_to_do() -> None:
    with (
        pytest.raises(ExecutorError, match="too little memory on its device, cpu") as raised,
        device_errors(),
    ):
        jnp.zeros(1 << 50).block_until_ready()
    assert "resume with more --workers" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_failures_of_a_device_are_what_they_were() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("the device is gone")

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone"), device_errors():
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(fail, shape, x))(1.0))


def test_a_worker_without_room_for_a_block_says_so(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = planned("gptq")
    claim(store, given.plan, given.windows.to_bytes())  # type: ignore[union-attr]

    def full(*_: Any) -> Any:
        return jnp.zeros(1 << 50).block_until_ready()

    monkeypatch.setattr(BlockWeights, "of", full)
    executor = LocalExecutor([QuickWorker(given.plan, str(source()), store.root_url)])
    with pytest.raises(ExecutorError, match="too little memory on its device"):
        quantize(given.plan, store, executor, lambda step: None)


class Weighing(LocalExecutor):
    """Adds up what is left on the device after each call."""

    def __init__(self, workers: list[object]) -> None:
        super().__init__(workers)
        self.before = _on_device()
        self.peak = 0

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        done = super().submit(worker, method, *args, **kwargs)
        self.peak = max(self.peak, _on_device() - self.before)
        return done


def _on_device() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_what_stays_on_the_device_is_what_was_estimated(store: ObjectStore) -> None:
    """As far as a CPU can tell: what is there between two calls, and not what passes within."""
    given = planned("gptq")
    claim(store, given.plan, given.windows.to_bytes())  # type: ignore[union-attr]
    executor = Weighing([QuickWorker(given.plan, str(source()), store.root_url)])
    quantize(given.plan, store, executor, lambda step: None)
    on_gpu = dataclasses.replace(given.plan, machine={"platform": "gpu", "device": "H100"})
    costs = estimates.estimate(on_gpu, 1)
    held = costs.device_bytes - estimates.estimate(on_gpu, 2).device_bytes  # half the windows
    assert 0.5 < executor.peak / (2 * held) < 1.0
    assert executor.peak < costs.device_bytes
    assert estimates.estimate(given.plan, 1).device_bytes == 0
