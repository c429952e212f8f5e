"""Runs on a CPU that is cut into four devices; prints what they store, and what was copied.

`XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.pipeline.worker.several_devices
SCHEME`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from pipeline.canonical import sha256
from pipeline.storage.object_store import open_store
from pipeline.worker import statistics
from pipeline.worker.devices import Devices
from pipeline.worker.worker import Worker
from quantizer.gptq import solve
from quantizer.gptq.factor import Factor
from tests.pipeline.run.test_expert_sums import planned as planned_experts
from tests.pipeline.tiny_runs import execute, lasting, planned


class Copies:
    """Counts what leaves a device: sums that go to another one, and large arrays to the host."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({"between devices": 0, "factors": 0})
        self.factored = 0
        self._moved, self._sent = statistics.on_device, statistics.in_numpy
        self._factorize, self._copied = solve.factorize, Factor.on_device

    def __enter__(self) -> Copies:
        def moved(total: Any, device: jax.Device) -> Any:
            found = self._moved(total, device)
            self.counts["between devices"] += found is not total
            if found is not total:
                assert all(array.devices() == {device} for array in found.arrays)
            return found

        def sent(total: Any) -> Any:
            self.counts["to the host"] += 1
            return self._sent(total)

        def factorize(*args: Any, **kwargs: Any) -> Any:
            self.factored += 1
            return self._factorize(*args, **kwargs)

        def copied(factor: Factor, device: jax.Device) -> Factor:
            self.counts["factors"] += 1
            found = self._copied(factor, device)
            assert found.pivot_C.devices() == {device} != factor.pivot_C.devices()
            return found

        solve.factorize, Factor.on_device = factorize, copied  # type: ignore[method-assign]
        statistics.on_device = moved
        worker_module = sys.modules[Worker.__module__]
        worker_module.in_numpy = sent  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        solve.factorize, Factor.on_device = self._factorize, self._copied  # type: ignore[method-assign]
        statistics.on_device = self._moved
        worker_module = sys.modules[Worker.__module__]
        worker_module.in_numpy = self._sent  # type: ignore[attr-defined]


def run(
    scheme: str, devices: int, workers: int, lose: Sequence[tuple[str, int]] = ()
) -> dict[str, Any]:
    """Quantize a tiny model; digests of what is stored, and counts of copies."""
    own = Devices(jax.devices()[:devices])
    Devices.of_this_process = classmethod(lambda _: own)  # type: ignore[method-assign,assignment]
    store = open_store(f"memory://{scheme}-{devices}-{workers}-{len(lose)}")
    given = planned_experts() if scheme == "experts" else planned(scheme, num_samples=100)
    with Copies() as copies:
        _, executor = execute(given, store, workers=workers, lose=lose)
    stored = lasting(store)
    placed = Counter(
        str(array.devices())
        for one in executor._workers
        for shard in one._worker._shards._held.values()  # type: ignore[attr-defined]
        for batch in shard
        for array in batch.values.values()
    )
    return {
        "sha256": sha256("".join(f"{k} {sha256(v)}\n" for k, v in sorted(stored.items())).encode()),
        "files": len(stored),
        "factors": copies.factored,
        "copies": dict(copies.counts),
        "calls": dict(executor.calls),
        "devices": len(placed),
        "shards": len(given.plan.tokens.shards) if given.plan.tokens else 0,
    }


def main(scheme: str) -> None:
    assert jax.device_count() == 4, jax.devices()
    # What is computed on one device with an array of another would copy it without saying so.
    jax.config.update("jax_transfer_guard_device_to_device", "disallow")
    solve._LARGEST_SLICE = 32
    found = {
        "1 device": run(scheme, 1, 1),
        "2 devices": run(scheme, 2, 1),
        "4 devices": run(scheme, 4, 1),
        "2 workers of 2 devices": run(scheme, 2, 2),
        "4 devices, lost": run(scheme, 4, 1, [("capture", 5)]),
        "2 workers of 2 devices, lost": run(scheme, 2, 2, [("solve", 4), ("merge", 3)]),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
