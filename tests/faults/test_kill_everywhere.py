"""The driver and its workers die before and after every storage operation of a run.

In one process, where dying is an exception that nobody handles; `kill_everywhere` does the same
with SIGKILL and real processes.
"""

from __future__ import annotations

import itertools

import pytest

import pipeline.storage.memory_store
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.faults.killing import WRITES, Killed, Killer, kill, killing_memory
from tests.pipeline.tiny_runs import NUM_BLOCKS, execute, lasting, planned

_numbers = itertools.count()


def fresh() -> ObjectStore:
    return open_store(f"memory://kill-everywhere/{next(_numbers)}")


def run(store: ObjectStore, scheme: str, killer: Killer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
        execute(planned(scheme), open_store(store.root_url), workers=2, keep_every=1)


@pytest.fixture(scope="module", params=["gptq", "int8"])
def uninterrupted(request: pytest.FixtureRequest) -> tuple[str, dict[str, bytes], list[str]]:
    """Scheme, what the run leaves, and its operations in order."""
    store, killer = fresh(), Killer(kill)
    run(store, request.param, killer)
    return request.param, lasting(store), [operation for operation, _ in killer.seen]


@pytest.mark.parametrize(
    "after", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["before", "after"]
)
@pytest.mark.parametrize(
    "only_writes", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["writes", "all"]
)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    only_writes: bool, after: bool, uninterrupted: tuple[str, dict[str, bytes], list[str]]
) -> None:
    scheme, expected, operations = uninterrupted
    chosen = [
        number
        for number, operation in enumerate(operations, start=1)
        if operation in WRITES or not only_writes
    ]
    assert len(chosen) > 3 * NUM_BLOCKS
    for number in chosen:
        store = fresh()
        with pytest.raises(Killed):
            run(store, scheme, Killer(kill, at=number, after=after))
        left = {key: store.get(key) for key in store.list()}
        # Whatever is there is whole and right, and a manifest only when everything is.
        for key, data in left.items():
            if key in expected:
                assert data == expected[key], (number, key)
        if MANIFEST_KEY in left:
            assert expected.items() <= left.items()
        run(store, scheme, Killer(kill))
        assert lasting(store) == expected, (number, operations[number - 1])
