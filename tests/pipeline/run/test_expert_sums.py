"""Sums over experts' inputs meet where each expert is solved: what travels is shared by workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from pipeline.executor.protocol import Handle
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Rule
from pipeline.reduction import split
from pipeline.run.worker_api import HeldSum, InputSum
from pipeline.storage.object_store import ObjectStore, open_store
from quantizer.schemes import GPTQScheme
from tests.families.tiny_families import shared_family
from tests.pipeline.tiny_runs import CountingExecutor, execute, lasting, recipe
from tests.selection import by_default

EXPERTS, INPUTS = 4, 64
_fresh = iter(range(1_000_000))


@cache
def planned() -> Planned:
    """Of a Mixtral whose experts alone are quantized, on three shards."""
    scheme = GPTQScheme(weight_bits=4, group_size=16, scale_search=False)
    wanted = recipe("gptq", num_samples=40).model_copy(
        update={"scheme": scheme, "rules": (Rule(pattern="attention", scheme=None),)}
    )
    given = make_plan(read_preset(str(shared_family("Mixtral"))), wanted, threads=2)
    assert given.plan.tokens is not None
    assert len(given.plan.tokens.shards) == 3
    return given


class SumsExecutor(CountingExecutor):
    """Records the sums with which experts are solved.

    Attributes:
        received: bytes of sums of others, by worker; solved: experts, by worker.
        own: sums that the worker held itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received: Counter[int] = Counter()
        self.solved: Counter[int] = Counter()
        self.own: list[HeldSum] = []

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        experts = kwargs.get("experts")
        if method.__name__ == "solve_slices" and experts:
            sums = args[3:]
            self.solved[worker] += len(experts)
            for one in sums:
                found = self.fetch([one])[0] if isinstance(one, Handle) else one
                if isinstance(found, HeldSum):
                    self.own.append(found)
                elif isinstance(found, InputSum):
                    assert found.experts == experts
                    self.received[worker] += sum(array.nbytes for array in found.arrays)
        return super().submit(worker, method, *args, **kwargs)


def run(
    workers: int, *, lose: list[tuple[str, int]] | None = None
) -> tuple[ObjectStore, SumsExecutor]:
    store = open_store(f"memory://expert-sums/{next(_fresh)}")
    _, executor = execute(
        planned(), store, workers=workers, lose=lose or [], make_executor=SumsExecutor
    )
    return store, executor


@cache
def expected() -> dict[str, bytes]:
    store, executor = run(1)
    assert not executor.received
    assert "merge" not in executor.calls
    return lasting(store)


@pytest.mark.parametrize("workers", by_default([2, 3, 4, 5], [3]))
def test_every_worker_gets_the_sums_of_its_own_experts_alone(workers: int) -> None:
    store, executor = run(workers)
    assert lasting(store) == expected()
    blocks = planned().plan.num_blocks
    of_expert = 4 * INPUTS**2 + 4  # a number of its rows beside it
    subtrees = split(3, workers)
    whole = blocks * EXPERTS * of_expert
    for worker in range(workers):
        elsewhere = sum(map(len, subtrees)) - len(subtrees[worker])
        assert executor.received[worker] == elsewhere * executor.solved[worker] * of_expert
    assert sum(executor.solved.values()) == blocks * EXPERTS
    assert max(executor.solved.values()) <= blocks * -(-EXPERTS // workers)
    # Each subtree leaves its worker once, but for what is solved there.
    assert sum(executor.received.values()) < sum(map(len, subtrees)) * whole
    assert {held.experts for held in executor.own} <= {range(EXPERTS)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("lost", [("send", 2), ("solve_slices", 2), ("capture", 4)])
def test_a_worker_that_dies_beside_its_experts_changes_no_byte(lost: tuple[str, int]) -> None:
    store, executor = run(3, lose=[lost])
    assert executor.calls["restore"] > 3
    assert lasting(store) == expected()
