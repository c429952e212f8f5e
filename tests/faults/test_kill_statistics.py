"""Whoever captures statistics, or solves on them, dies before and after every write.

As in `test_kill_everywhere`, in one process. Leases have tests of their own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

import pipeline.storage.memory_store
from jobs.shared_statistics import with_statistics
from pipeline.plan import Plan
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.faults.killing import WRITES, Killed, Killer, kill, killing_memory
from tests.pipeline.float_runs import lasting_all, planned_in_float
from tests.pipeline.late_commits import LateCommits
from tests.pipeline.tiny_runs import NUM_BLOCKS, CountingExecutor, QuickWorker

_numbers = itertools.count()


def fresh() -> ObjectStore:
    return open_store(f"memory://kill-statistics/{next(_numbers)}")


class NoLease:
    """Stands for a lease whose holder is alone."""

    epoch = 1

    def __enter__(self) -> NoLease:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was taken."""

    def check(self) -> None:
        """Nobody else can have it."""


def run(url: str, killer: Killer, make_executor: type[CountingExecutor] = CountingExecutor) -> None:
    given = planned_in_float("gptq")
    assert given.windows is not None

    def drive(plan: Plan, store: ObjectStore, _: Any = None) -> None:
        def make_worker() -> QuickWorker:
            return QuickWorker(plan, plan.source_url, store.root_url)

        executor = make_executor(make_worker, 2)
        quantize(plan, store, executor, lambda step: None, keep_every=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
        store = open_store(url)
        plan = claim(store, given.plan, given.windows.to_bytes())
        lease: Any = NoLease()
        with_statistics(plan, store, lambda _: lease, drive, lambda: drive(plan, store))


@dataclass(frozen=True)
class Uninterrupted:
    """What a run leaves, its statistics included, and its storage operations, in order."""

    expected: dict[str, bytes]
    operations: list[tuple[str, str]]


@cache
def uninterrupted(make_executor: type[CountingExecutor]) -> Uninterrupted:
    store, killer = fresh(), Killer(kill)
    run(store.root_url, killer, make_executor)
    return Uninterrupted(lasting_all(store), killer.seen)


def check_killed(number: int, make_executor: type[CountingExecutor], *, after: bool) -> None:
    """Die at an operation, and resume."""
    store, given = fresh(), uninterrupted(make_executor)
    with pytest.raises(Killed):
        run(store.root_url, Killer(kill, at=number, after=after), make_executor)
    left = {key: store.get(key) for key in store.list()}
    for key, data in left.items():
        if key in given.expected:
            assert data == given.expected[key], (number, key)
    if MANIFEST_KEY in left:
        assert given.expected.items() <= left.items()
    run(store.root_url, Killer(kill))
    assert lasting_all(store) == given.expected, (number, given.operations[number - 1])


@pytest.mark.parametrize(
    ("every", "late"),
    [
        pytest.param(9, False, id="some"),
        pytest.param(1, False, id="all", marks=pytest.mark.exhaustive),
        pytest.param(4, True, id="commits late", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_on_statistics_that_is_killed_at_any_write_ends_with_the_same_bytes(
    every: int, late: bool
) -> None:
    make_executor = LateCommits if late else CountingExecutor
    operations = uninterrupted(make_executor).operations
    writes = [n for n, (kind, _) in enumerate(operations, start=1) if kind in WRITES]
    assert len(writes) > 8 * NUM_BLOCKS
    for place, number in enumerate(writes[::every]):
        check_killed(number, make_executor, after=place % 2 == 1)
