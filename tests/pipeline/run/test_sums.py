"""Sums over inputs stay with the workers that made them; one leaves if another needs it, once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from pipeline.executor.protocol import Handle
from pipeline.planning.make_plan import Planned
from pipeline.reduction import split
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.run.worker_api import HeldSum
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker import statistics
from pipeline.worker.worker import Worker
from quantizer import HessianSum
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    CountingExecutor,
    QuickWorker,
    execute,
    lasting,
    planned,
    source,
)
from tests.quantizer.device_arrays import OnDevice
from tests.selection import by_default

_fresh = iter(range(1_000_000))


def fresh() -> ObjectStore:
    return open_store(f"memory://test-sums/{next(_fresh)}")


@cache
def expected(scheme: str) -> dict[str, bytes]:
    """What one worker leaves."""
    store = fresh()
    execute(planned(scheme), store)
    return lasting(store)


def array_bytes(passed: Any) -> int:
    """Of all arrays inside what is passed."""
    if isinstance(passed, np.ndarray | jax.Array):
        return passed.nbytes
    if dataclasses.is_dataclass(passed):
        return sum(array_bytes(getattr(passed, x.name)) for x in dataclasses.fields(passed))
    if isinstance(passed, Mapping):
        return sum(map(array_bytes, passed.values()))
    if isinstance(passed, Sequence) and not isinstance(passed, str | bytes | range):
        return sum(map(array_bytes, passed))
    return 0


class WatchedExecutor(CountingExecutor):
    """Records what passes between driver and workers.

    Attributes:
        passed: of each method, bytes of arrays in its arguments and its results.
        sent: every sum that left its worker, and its bytes.
        solved_with: how often solves were given a sum, or its name, by worker.
    """

    def __init__(self, make_worker: Callable[[], Worker], num_workers: int) -> None:
        super().__init__(make_worker, num_workers)
        self.passed: dict[str, Counter[str]] = {}
        self.sent: list[tuple[HeldSum, int]] = []
        self.solved_with: Counter[tuple[int, str]] = Counter()

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        handle = super().submit(worker, method, *args, **kwargs)
        [result] = self.fetch([handle])
        given = [self.fetch([arg])[0] if isinstance(arg, Handle) else arg for arg in args]
        found = self.passed.setdefault(method.__name__, Counter())
        found["arguments"] += array_bytes(given)
        found["results"] += array_bytes(result)
        if method.__name__ == "send":
            self.sent.append((given[0], array_bytes(result)))
        if method.__name__.startswith("solve"):
            self.solved_with[worker, type(given[3]).__name__] += 1
        return handle


def watched(
    given: Planned, store: ObjectStore, workers: int, make: Any = WatchedExecutor
) -> tuple[Any, list[Step]]:
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    executor = make(lambda: QuickWorker(given.plan, str(source()), store.root_url), workers)
    steps: list[Step] = []
    quantize(given.plan, store, executor, steps.append)
    return executor, steps


@pytest.mark.parametrize("scheme", by_default(["gptq", "awq-foldable", "float8"], ["gptq"]))
def test_no_sum_leaves_a_single_worker(scheme: str) -> None:
    given, store = planned(scheme), fresh()
    executor, _ = watched(given, store, 1)
    assert "send" not in executor.passed
    assert executor.passed["capture"]["results"] == 0
    assert {kind for _, kind in executor.solved_with} == {"HeldSum"}
    # Solves are given the block's own arrays, and no more.
    per_block = Counter(part for method, part in executor.done if method == "solve")
    blocks = given.plan.parts[1:]
    own = sum(per_block[p.part] * array_bytes(executor_values(given, p.part)) for p in blocks)
    assert executor.passed["solve"]["arguments"] == own
    assert lasting(store) == expected(scheme)


def executor_values(given: Planned, part: int) -> Any:
    return QuickWorker(given.plan, str(source()), "memory://unused").read(part)


@pytest.mark.parametrize("case", by_default([(2, 20), (3, 20), (3, 100), (4, 100)], [(3, 20)]))
def test_a_sum_leaves_its_worker_once_and_only_for_another(case: tuple[int, int]) -> None:
    workers, samples = case
    given, store = planned("gptq", num_samples=samples), fresh()
    executor, _ = watched(given, store, workers)
    assert given.plan.tokens is not None
    num_shards = len(given.plan.tokens.shards)
    assert num_shards == -(-samples // 16)
    assert len(set(executor.sent)) == len(executor.sent)
    whole = range(num_shards)
    holders = sum(1 for share in split(num_shards, workers) if share)
    for block, part in enumerate(given.plan.parts[1:]):
        for stage, group in enumerate(part.groups):
            sent = {
                held.leaves: size
                for held, size in executor.sent
                if (held.block, held.stage) == (block, stage)
            }
            assert set(sent.values()) == {4 * group.in_features**2}
            assert len(group.targets) == 1 or whole in sent
            # Each holder's own, merged as far as it can be, and the first one's once it is whole.
            assert len(sent) <= holders
    assert executor.solved_with[0, "InputSum"] == 0
    assert all(kind == "InputSum" for worker, kind in executor.solved_with if worker)
    assert executor.passed["merge"]["results"] == executor.passed["capture"]["results"] == 0


class ForgetfulExecutor(CountingExecutor):
    """A worker dies after some call of a method, and starts anew before the next."""

    def __init__(self, make_worker: Callable[[], Worker], num_workers: int) -> None:
        super().__init__(make_worker, num_workers)
        self.after: tuple[str, int] = ("", 0)

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        handle = super().submit(worker, method, *args, **kwargs)
        if (method.__name__, self.calls[method.__name__]) == self.after:
            self.restart(worker)
        return handle


@pytest.mark.parametrize(
    "after",
    by_default(
        [("capture", 1), ("capture", 4), ("merge", 2), ("send", 1), ("send", 4)],
        [("capture", 4), ("merge", 2)],
    ),
)
def test_a_worker_that_lost_its_sums_captures_them_again(after: tuple[str, int]) -> None:
    store = fresh()

    def make(make_worker: Callable[[], Worker], num_workers: int) -> ForgetfulExecutor:
        executor = ForgetfulExecutor(make_worker, num_workers)
        executor.after = after
        return executor

    executor, steps = watched(planned("gptq"), store, 2, make)
    assert executor.calls[after[0]] > after[1]
    assert [step.event for step in steps].count("lost") == 1
    assert [step.event for step in steps].count("committed") == NUM_BLOCKS + 1
    assert lasting(store) == expected("gptq")


@pytest.mark.parametrize("workers", by_default([1, 2], [2]))
@pytest.mark.parametrize("scheme", by_default(["gptq", "awq-foldable"], ["gptq"]))
def test_sums_of_a_device_are_merged_and_solved_there_to_the_same_bytes(
    scheme: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(scheme)
    monkeypatch.setattr(statistics, "_kept", lambda arrays: arrays)
    solved: list[HessianSum] = []

    def on_device(gram_CC: Any, num_rows: int) -> HessianSum:
        assert isinstance(gram_CC, jax.Array)
        solved.append(HessianSum(OnDevice(gram_CC), num_rows))  # type: ignore[arg-type]
        return solved[-1]

    monkeypatch.setattr(statistics, "HessianSum", on_device)
    store = fresh()
    watched(planned(scheme), store, workers)
    assert len(solved) >= 4 * NUM_BLOCKS
    assert lasting(store) == wanted
