"""While a block is solved, the one before it is committed: in any order, nothing more is lost."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from pipeline.errors import LeaseLostError, StorageError
from pipeline.executor.protocol import ExecutorError
from pipeline.plan import Plan
from pipeline.run.events import Step
from pipeline.run.records import file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.late_commits import LateCommits
from tests.pipeline.threaded_executor import ThreadedExecutor
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    QuickWorker,
    execute,
    lasting,
    planned,
)
from tests.selection import by_default

_fresh = itertools.count()
_SECONDS = 60.0
"""How long a thread is waited for that should come at once."""


def fresh() -> ObjectStore:
    return open_store(f"memory://overlap/{next(_fresh)}")


@pytest.fixture
def store() -> ObjectStore:
    return fresh()


@cache
def expected() -> dict[str, bytes]:
    """What one worker leaves whose calls are done as soon as they are submitted."""
    store = fresh()
    execute(planned("gptq"), store)
    return lasting(store)


@pytest.mark.parametrize("workers", by_default([1, 2, 3], [1, 3]))
def test_a_block_is_solved_while_the_one_before_is_committed(
    workers: int, store: ObjectStore
) -> None:
    steps: list[Step] = []
    _, executor = execute(
        planned("gptq"),
        store,
        workers=workers,
        keep_every=2,
        report=steps.append,
        make_executor=LateCommits,
    )
    assert lasting(store) == expected()
    done, submitted = executor.done, executor.submitted
    for block in range(NUM_BLOCKS - 1):
        commit = done.index(("commit", block + 1))
        for ahead in (("capture", block + 1), ("solve", block + 2)):
            assert done.index(ahead) < commit, "the block after a commit waits for it"
        # The next commit names this record, and no shard goes further ahead than one block.
        assert submitted.index(("commit", block + 2)) > submitted.index(("solve", block + 2))
        for behind in (("keep", block + 1), ("propagate", block + 1), ("commit", block + 2)):
            assert behind not in done or done.index(behind) > commit
        assert done.index(("read", block + 2)) < done.index(("capture", block))
    shown = [(step.event, step.part) for step in steps]
    assert shown == [
        ("committed", 0),
        ("committed", 1),
        ("committed", 2),
        ("kept", 2),
        ("committed", 3),
        ("sealed", None),
    ]


def test_each_report_has_the_seconds_of_its_own_block(store: ObjectStore) -> None:
    steps: list[Step] = []
    _, executor = execute(
        planned("gptq"), store, workers=2, report=steps.append, make_executor=LateCommits
    )
    blocks = [step for step in steps if step.event == "committed" and step.part != 0]
    for step in blocks[:-1]:
        assert {"capture", "solve", "commit", "propagate"} <= set(step.seconds)
    assert {"capture", "solve", "commit"} <= set(blocks[-1].seconds)
    assert "propagate" not in blocks[-1].seconds
    named = {stage for step in steps for stage in step.seconds}
    assert named == set(executor.calls)
    assert executor.take_work() == []


def solved_parts(executor: LateCommits) -> list[list[int]]:
    """The parts of the blocks that were solved, at least begun, by attempt."""
    attempts: list[list[int]] = []
    for method, part in executor.done:
        if method == "restore" and (not attempts or attempts[-1]):
            attempts.append([])
        if method == "solve" and part not in attempts[-1]:
            attempts[-1].append(part)
    return attempts


@pytest.mark.parametrize(
    ("lost", "solved"),
    [
        # Of eight captures a block by two workers, the first of which commits block 0,
        # and is lost with that commit as block 1 begins,
        pytest.param(("capture", 9), [[1], [1, 2, 3]], marks=pytest.mark.exhaustive),
        # or when most of block 1 is solved;
        (("capture", 15), [[1, 2], [1, 2, 3]]),
        # the other is lost, and the commit goes on,
        (("capture", 16), [[1, 2], [2, 3]]),
        # and the same when the other commits block 1.
        pytest.param(("propagate", 3), [[1, 2], [3]], marks=pytest.mark.exhaustive),
        pytest.param(("propagate", 4), [[1, 2], [2, 3]], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_lost_worker_costs_at_most_the_block_that_it_commits_and_the_one_under_way(
    lost: tuple[str, int], solved: list[list[int]], store: ObjectStore
) -> None:
    steps: list[Step] = []
    _, executor = execute(
        planned("gptq"),
        store,
        workers=2,
        report=steps.append,
        lose=[lost],
        make_executor=LateCommits,
    )
    assert solved_parts(executor) == solved
    committed = [step.part for step in steps if step.event == "committed"]
    assert committed == list(range(NUM_BLOCKS + 1)), "in order, and each once"
    assert [step.event for step in steps].count("lost") == 1
    assert lasting(store) == expected()


class _Watched:
    """A backend that tells of every write-once before it is carried out."""

    def __init__(self, backend: Any, before: Callable[[str], None]) -> None:
        self._backend = backend
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def create(self, key: str, data: bytes) -> None:
        self._before(key)
        self._backend.create(key, data)


class WatchedWorker(QuickWorker):
    """Tells of its calls as they begin, and of what it is about to commit."""

    def __init__(self, plan: Plan, source_url: str, run_url: str) -> None:
        super().__init__(plan, source_url, run_url)
        self._store = ObjectStore(run_url, _Watched(self._store.backend, self.commits))

    def commits(self, key: str) -> None:
        pass


@pytest.mark.parametrize(
    "key", by_default([file_key(1), record_key(1), record_key(2)], [record_key(1)])
)
def test_a_commit_that_fails_while_the_next_block_is_solved_ends_the_run_which_resumes(
    key: str, store: ObjectStore
) -> None:
    part = 2 if key == record_key(2) else 1
    solved: list[int] = []

    class Solving(WatchedWorker):
        def solve(self, part: int, *args: Any) -> Any:
            solved.append(part)
            return super().solve(part, *args)

    class Refused(Solving):
        def commits(self, about: str) -> None:
            if about == key:
                assert solved[-1] == part + 1, "the next block is under way"
                raise StorageError("the bucket is full")

    late: Any = {"workers": 2, "keep_every": 1, "make_executor": LateCommits}
    with pytest.raises(StorageError, match="bucket is full"):
        execute(planned("gptq"), store, make_worker=Refused, **late)
    assert [store.exists(record_key(p)) for p in (1, 2, 3)] == [part == 2, False, False]
    solved.clear()
    execute(planned("gptq"), store, make_worker=Solving, **late)
    assert sorted(set(solved)) == list(range(part, NUM_BLOCKS + 1))
    assert lasting(store) == expected()


@pytest.mark.parametrize("error", [ExecutorError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_error_elsewhere_lets_the_commit_under_way_end_but_an_interrupt_does_not_wait(
    error: BaseException, store: ObjectStore
) -> None:
    class Failing(QuickWorker):
        def propagate(self, *args: Any) -> None:
            raise error

    with pytest.raises(type(error)):
        execute(planned("gptq"), store, make_executor=LateCommits, make_worker=Failing)
    assert store.exists(record_key(1)) == isinstance(error, Exception)


@pytest.mark.parametrize("lost_at", by_default([1, 2, 3], [2]))
def test_a_driver_that_lost_its_lease_has_begun_at_most_one_commit_since(
    lost_at: int, store: ObjectStore
) -> None:
    found: list[LateCommits] = []

    class Found(LateCommits):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(self)

    checks: list[int] = []

    def check() -> None:
        begun = [part for method, part in found[0].submitted if method == "commit"]
        ended = [part for method, part in found[0].done if method == "commit"]
        assert begun == ended, "a commit is under way"
        checks.append(len(begun))
        if len(checks) == lost_at:
            raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        execute(planned("gptq"), store, make_executor=Found, check_lease=check)
    assert checks == list(range(lost_at)), "one commit between two checks"
    committed = [part for part in range(1, NUM_BLOCKS + 1) if store.exists(record_key(part))]
    assert committed == list(range(1, lost_at))


class Meeting:
    """Where threads wait for each other by name; those that never come fail instead of hanging."""

    def __init__(self) -> None:
        self._events: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def reach(self, name: str) -> None:
        self._events[name].set()

    def await_(self, name: str) -> None:
        assert self._events[name].wait(_SECONDS), f"{name} does not come"


@pytest.mark.parametrize("workers", by_default([1, 2, 3], [1]))
def test_storage_that_is_slow_holds_up_no_computing(workers: int, store: ObjectStore) -> None:
    """A commit ends after the next block was solved, and reads last as long; nothing hangs."""
    meeting = Meeting()

    class Slow(WatchedWorker):
        def read(self, part: int) -> Any:
            meeting.reach(f"read {part}")
            if part > 2:
                # The commit before the block under way, perhaps by this very worker.
                meeting.await_(f"commit {part - 2}")
                meeting.await_(f"solve {part - 1}")
            return super().read(part)

        def capture(self, block: int, stage: int, *args: Any, **named: Any) -> Any:
            found = super().capture(block, stage, *args, **named)
            meeting.reach(f"capture {block}")
            return found

        def solve(self, part: int, *args: Any) -> Any:
            found = super().solve(part, *args)
            meeting.reach(f"solve {part}")
            return found

        def commits(self, key: str) -> None:
            for part in range(1, NUM_BLOCKS + 1):
                if key in (file_key(part), record_key(part)):
                    meeting.reach(f"commit {part}")
                    if part < NUM_BLOCKS:
                        meeting.await_(f"capture {part}")
                        meeting.await_(f"solve {part + 1}")
                    if part + 2 <= NUM_BLOCKS:
                        meeting.await_(f"read {part + 2}")

    execute(
        planned("gptq"),
        store,
        workers=workers,
        make_executor=ThreadedExecutor,
        make_worker=Slow,
    )
    assert lasting(store) == expected()
