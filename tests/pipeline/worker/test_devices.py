"""A worker with several devices uses all of them, and leaves the bytes of a worker with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import pytest

import quantizer.gptq.solve
from pipeline.reduction import halves, join, reduce_subtree
from pipeline.storage.object_store import open_store
from pipeline.worker.devices import Devices
from tests.pipeline.tiny_runs import execute, lasting, planned
from tests.selection import by_default

[CPU] = jax.devices()
PLACES: dict[str, Callable[[int], int]] = {
    "threes": lambda leaf: leaf // 3,
    "scattered": lambda leaf: leaf % 4,
    "fours": lambda leaf: min(leaf // 4, 3),
    "one": lambda _: 2,
}


def as_text(leaf: int) -> str:
    return str(leaf)


def added(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("num_leaves", range(1, 13))
def test_the_halves_of_a_subtree_are_its_nodes(num_leaves: int) -> None:
    def total(leaves: range) -> str:
        if len(leaves) == 1:
            return as_text(leaves[0])
        left, right = halves(leaves)
        return added(total(left), total(right))

    leaves = range(16, 16 + num_leaves)
    assert total(leaves) == join([*map(as_text, leaves)], added)
    assert total(leaves) == reduce_subtree(leaves, as_text, added)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_leaves", [1, 2, 7, 8, 12])
def test_sums_are_added_in_the_same_order_wherever_leaves_are(place: str, num_leaves: int) -> None:
    leaves = range(8, 8 + num_leaves)

    def device_of(leaf: int) -> int:
        return PLACES[place](leaf - 8)

    found = Devices([CPU] * 4).reduce(leaves, device_of, as_text, added)
    assert found == reduce_subtree(leaves, as_text, added)


def test_all_devices_work_at_once_each_on_its_own() -> None:
    together = threading.Barrier(3, timeout=20)

    def work(number: int) -> tuple[int, Any]:
        together.wait()
        return number, jax.config.jax_default_device

    assert Devices([CPU] * 3).each(work) == [(0, None), (1, CPU), (2, CPU)]


def test_one_device_is_left_to_the_calling_thread() -> None:
    found = Devices([CPU]).each(lambda number: (number, threading.current_thread()))
    assert found == [(0, threading.current_thread())]
    assert Devices([CPU]).several == ()
    assert len(Devices.of_this_process()) == 1


def test_an_error_on_one_device_is_the_workers() -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise ValueError("device 2")

    with pytest.raises(ValueError, match="device 2"):
        Devices([CPU] * 4).each(fail)


@pytest.mark.parametrize(
    "scheme", by_default(["gptq", "drift", "awq", "float8", "int8"], ["float8"])
)
def test_several_devices_leave_the_bytes_of_one(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a worker dies, and with slices of rows that the devices share."""
    monkeypatch.setattr(quantizer.gptq.solve, "_LARGEST_SLICE", 64)
    given = planned(scheme, num_samples=80)
    stored = []
    for devices, lose in ((1, ()), (3, [("solve", 6)])):
        own = Devices([CPU] * devices)
        monkeypatch.setattr(Devices, "of_this_process", lambda own=own: own)
        store = open_store(f"memory://devices-{scheme}-{devices}")
        execute(given, store, keep_every=1, lose=lose)
        stored.append(lasting(store))
    assert stored[0] == stored[1]


def on_four_devices(scheme: str) -> dict[str, Any]:
    """Runs on a CPU that is cut into four devices, some with workers that die."""
    command = [sys.executable, "-m", "tests.pipeline.worker.several_devices", scheme]
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert len({one["sha256"] for one in found.values()}) == 1, found
    return found


@pytest.mark.slow
def test_experts_are_solved_on_all_devices_to_the_same_bytes() -> None:
    found = on_four_devices("experts")
    # Three shards are on three of them; copies of factors are the dense layers'.
    assert (found["1 device"]["devices"], found["4 devices"]["devices"]) == (1, 3)
    assert found["1 device"]["factors"] == found["4 devices"]["factors"]


@pytest.mark.exhaustive
def test_devices_of_their_own_memory_copy_sums_to_each_other_alone() -> None:
    found = on_four_devices("gptq")
    one, two, four = (found[f"{n} device{'s' * (n > 1)}"] for n in (1, 2, 4))
    # Seven shards: devices add up 4 and 3, or 2, 2, 2 and 1, and copy what they have once.
    captures = one["calls"]["capture"]
    assert (one["devices"], two["devices"], four["devices"]) == (1, 2, 4)
    assert one["copies"]["between devices"] == 0
    assert two["copies"]["between devices"] == captures
    assert four["copies"]["between devices"] == 3 * captures
    for alone in (one, two, four):
        assert "to the host" not in alone["copies"]
        assert (alone["factors"], alone["calls"]["solve"]) == (captures, captures)
    # Each device but the first solves with a copy of the factor.
    assert (one["copies"]["factors"], two["copies"]["factors"]) == (0, captures)
    assert captures < four["copies"]["factors"] <= 3 * captures
    both = found["2 workers of 2 devices"]
    assert both["copies"]["to the host"] == both["calls"]["send"] > 0
