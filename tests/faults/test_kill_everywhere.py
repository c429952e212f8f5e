"""The driver and its workers die before and after every storage operation of a run.

In one process, where dying is an exception that nobody handles; `kill_everywhere` does the same
with SIGKILL and real processes. Commits are carried out at once, or late, when the next block is
solved: then the process dies between the two.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

import pytest

import pipeline.storage.memory_store
from pipeline.run.records import MANIFEST_KEY, file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from tests.faults.killing import WRITES, Killed, Killer, kill, killing_memory
from tests.pipeline.late_commits import LateCommits
from tests.pipeline.tiny_runs import NUM_BLOCKS, CountingExecutor, execute, lasting, planned

EXHAUSTIVE = pytest.mark.exhaustive
_numbers = itertools.count()


def fresh() -> ObjectStore:
    return open_store(f"memory://kill-everywhere/{next(_numbers)}")


def run(store: ObjectStore, scheme: str, killer: Killer, *, late: bool = False) -> None:
    make_executor = LateCommits if late else CountingExecutor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
        found = open_store(store.root_url)
        execute(planned(scheme), found, workers=2, keep_every=1, make_executor=make_executor)


@dataclass(frozen=True, kw_only=True)
class Uninterrupted:
    """What a run leaves, and its storage operations, (operation, key), in order."""

    scheme: str
    late: bool
    expected: dict[str, bytes]
    operations: list[tuple[str, str]]

    @classmethod
    def of(cls, scheme: str, *, late: bool = False) -> Self:
        store, killer = fresh(), Killer(kill)
        run(store, scheme, killer, late=late)
        return cls(scheme=scheme, late=late, expected=lasting(store), operations=killer.seen)

    def check_killed(self, number: int, *, after: bool) -> None:
        """Die at an operation, and resume."""
        store, expected = fresh(), self.expected
        with pytest.raises(Killed):
            run(store, self.scheme, Killer(kill, at=number, after=after), late=self.late)
        left = {key: store.get(key) for key in store.list()}
        # Whatever is there is whole and right, and a manifest only when everything is.
        for key, data in left.items():
            if key in expected:
                assert data == expected[key], (number, key)
        if MANIFEST_KEY in left:
            assert expected.items() <= left.items()
        # A record's own block is there, and so are all before it.
        records = [record_key(part) in left for part in range(1, NUM_BLOCKS + 1)]
        assert records == sorted(records, reverse=True) or self.scheme == "int8"
        run(store, self.scheme, Killer(kill))
        assert lasting(store) == expected, (number, self.operations[number - 1])


@pytest.fixture(
    scope="module",
    params=[("gptq", False), pytest.param(("gptq", True), marks=EXHAUSTIVE), ("int8", False)],
    ids=["gptq", "gptq, commits late", "int8"],
)
def uninterrupted(request: pytest.FixtureRequest) -> Uninterrupted:
    scheme, late = request.param
    return Uninterrupted.of(scheme, late=late)


@pytest.mark.parametrize(
    ("at", "after"),
    [
        pytest.param("every third write", False, id="every third write"),
        pytest.param("other writes", False, id="other writes", marks=EXHAUSTIVE),
        pytest.param("writes", True, id="after writes", marks=EXHAUSTIVE),
        # Reading changes nothing: whoever dies after it leaves what one leaves who dies before.
        pytest.param("reads", False, id="reads", marks=EXHAUSTIVE),
    ],
)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    at: str, after: bool, uninterrupted: Uninterrupted
) -> None:
    every = range(1, len(uninterrupted.operations) + 1)
    writes = [number for number in every if uninterrupted.operations[number - 1][0] in WRITES]
    chosen = {
        "writes": writes,
        "every third write": writes[::3],
        "other writes": sorted(set(writes) - set(writes[::3])),
        "reads": sorted(set(every) - set(writes)),
    }
    assert len(writes) > 3 * NUM_BLOCKS
    assert len(chosen["reads"]) > 3 * NUM_BLOCKS
    for number in chosen[at]:
        uninterrupted.check_killed(number, after=after)


def test_a_run_killed_in_a_commit_while_the_next_block_is_solved_ends_with_the_same_bytes() -> None:
    given = Uninterrupted.of("gptq", late=True)
    keys = [key for part in range(1, NUM_BLOCKS) for key in (file_key(part), record_key(part))]
    for key in keys:
        given.check_killed(given.operations.index(("create", key)) + 1, after=key == keys[-1])
