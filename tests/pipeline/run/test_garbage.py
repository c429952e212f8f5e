"""Garbage is everything that no reader and no resumed run needs, and nothing else."""

from __future__ import annotations

import json

import pytest

from pipeline.run.garbage import find_garbage, find_runs, remove
from pipeline.run.lease import acquire
from pipeline.run.records import file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.tiny_runs import CrashError, crash_at, execute, lasting, planned
from tests.selection import by_default

_fresh = iter(range(1_000_000))


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://test-garbage/{next(_fresh)}")


def sweep(store: ObjectStore) -> dict[str, str]:
    found = find_garbage(store)
    for garbage in found:
        assert garbage.size_bytes == store.size(garbage.key)
        remove(store, garbage)
    assert find_garbage(store) == ()
    return {garbage.key: garbage.reason for garbage in found}


def test_everything_that_a_manifest_names_stays(store: ObjectStore) -> None:
    execute(planned("gptq"), store, keep_every=1)
    before = lasting(store)
    events = json.dumps({"event": "started"}).encode()
    store.put("events/1.jsonl", events)
    for key in ("quarantine/x", "artifact/model_00099.weights.h5", "tokens/other", "thesis.txt"):
        store.put(key, b"x")
    swept = sweep(store)
    assert {key for key in swept if not key.startswith("activations/")} == {
        "quarantine/x",
        "artifact/model_00099.weights.h5",
        "tokens/other",
    }
    assert any(key.startswith("activations/") for key in swept)
    assert store.list("activations/") == ()
    assert store.get("thesis.txt") == b"x"
    assert store.get("events/1.jsonl") == events
    store.delete("thesis.txt")
    assert lasting(store) == before


@pytest.mark.parametrize("part", by_default([1, 2, 3], [2]))
def test_an_interrupted_run_resumes_as_before_the_sweep(part: int, store: ObjectStore) -> None:
    whole = open_store(f"{store.root_url}-whole")
    execute(planned("gptq"), whole, keep_every=1)
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=1, report=crash_at(part))
    # As a crash between data and record leaves it.
    store.delete(record_key(part))
    kept = store.list("activations/")
    sweep(store)
    assert store.exists(file_key(part))
    assert store.list("activations/") == kept
    _, executor = execute(planned("gptq"), store, keep_every=1)
    assert executor.solved_parts() == list(range(part, 4))
    assert lasting(store) == lasting(whole)


def test_all_leases_but_the_latest_are_garbage(store: ObjectStore) -> None:
    execute(planned("int8"), store)
    for _ in range(3):
        acquire(store).release()
    held = acquire(store)
    assert set(sweep(store)) == {
        f"leases/0000{epoch}{end}" for epoch in (1, 2, 3) for end in (".json", ".beat.json")
    }
    held.check()
    held.release()
    acquire(store).release()
    assert store.exists("leases/00005.json")


def test_leftovers_of_interrupted_writes_are_garbage(tmp_path) -> None:
    store = open_store(str(tmp_path))
    execute(planned("int8"), store)
    (tmp_path / "artifact" / ".model_00001.weights.h5.0123456789abcdef").write_bytes(b"half")
    (tmp_path / "artifact" / ".hidden").write_bytes(b"mine")
    [found] = find_garbage(store)
    assert found.is_leftover
    remove(store, found)
    assert find_garbage(store) == ()
    assert (tmp_path / "artifact" / ".hidden").read_bytes() == b"mine"


def test_runs_are_found_below_a_root() -> None:
    root = open_store("memory://test-garbage-roots")
    for key in ("plan.json", "runs/a/plan.json", "runs/b/plan.json", "runs/c/else.json"):
        root.put(key, b"")
    assert find_runs(root) == ("", "runs/a/", "runs/b/")
