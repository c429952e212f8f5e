"""A run leaves the same bytes whoever does the work, however often it is interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantizer.gptq.solve
from pipeline.artifact.weights_file import read_weights_file
from pipeline.canonical import sha256
from pipeline.errors import PlanMismatchError
from pipeline.executor.protocol import ExecutorError, Handle
from pipeline.model.preset import read_preset
from pipeline.plan import PLAN_KEY
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.run.records import MANIFEST_KEY, file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.worker import Worker
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    CountingExecutor,
    CrashError,
    QuickWorker,
    crash_at,
    execute,
    lasting,
    planned,
    recipe,
    source,
)
from tests.selection import by_default, covering

ALL_PARTS = list(range(NUM_BLOCKS + 1))
_fresh = iter(range(1_000_000))


def fresh() -> ObjectStore:
    return open_store(f"memory://test-run/{next(_fresh)}")


@cache
def expected(scheme: str) -> dict[str, bytes]:
    """What one worker leaves when nothing happens."""
    store = fresh()
    execute(planned(scheme), store)
    return lasting(store)


@pytest.fixture
def store() -> ObjectStore:
    return fresh()


@pytest.mark.parametrize(("scheme", "workers"), covering(["gptq", "int8"], [2, 3, 4]))
def test_any_number_of_workers_leaves_the_same_bytes(
    scheme: str, workers: int, store: ObjectStore
) -> None:
    execute(planned(scheme), store, workers=workers)
    assert lasting(store) == expected(scheme)


@pytest.mark.exhaustive
def test_layers_of_one_input_share_the_scales_that_can_be_folded(store: ObjectStore) -> None:
    given = planned("awq-foldable")
    execute(given, store, workers=2)
    assert lasting(store) == expected("awq-foldable")
    arrays = read_weights_file(store.get(file_key(1)), max_bytes=1 << 24)
    # Of each layer: codes, scales, zero points, input scales, groups.
    scales = {group: found[3] for group, found in arrays.items() if len(found) == 5}
    of_layer = {
        name: next(scale for group, scale in scales.items() if f"_{name}_dense/" in group)
        for name in ("query", "key", "value", "feedforward_gate", "feedforward_intermediate")
    }
    for first, *others in (("query", "key", "value"), tuple(of_layer)[3:]):
        assert len(set(of_layer[first].tolist())) > 10
        for other in others:
            np.testing.assert_array_equal(of_layer[first], of_layer[other])
    assert not np.array_equal(of_layer["query"], of_layer["feedforward_gate"])


def test_slices_of_rows_are_spread_and_leave_the_same_bytes(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer.gptq.solve, "_LARGEST_SLICE", 32)
    given = make_plan(read_preset(str(source())), recipe("gptq"), threads=2)
    counts = {layer.slices for part in given.plan.parts for layer in part.layers}
    assert counts >= {1, 2, 4}
    alone = fresh()
    execute(given, alone)
    _, executor = execute(given, store, workers=3, lose=[("join", 2), ("solve_slices", 9)])
    assert executor.calls["solve_slices"] > 3 * NUM_BLOCKS
    assert executor.calls["join"] >= NUM_BLOCKS
    assert lasting(store) == lasting(alone)


def test_every_block_has_one_file_and_the_manifest_names_all() -> None:
    files = expected("gptq")
    assert {file_key(part) for part in ALL_PARTS} | {record_key(part) for part in ALL_PARTS} < set(
        files
    )
    assert {PLAN_KEY, MANIFEST_KEY, "artifact/config.json", "artifact/task.json"} < set(files)
    store = fresh()
    for key, data in files.items():
        store.put(key, data)
    manifest = read_manifest(store)
    assert set(manifest.files) == {key for key in files if key.startswith("artifact/")}
    for key, entry in manifest.files.items():
        assert (sha256(files[key]), len(files[key])) == (entry.sha256, entry.size_bytes)


@pytest.mark.parametrize("part", ALL_PARTS)
def test_a_crashed_driver_resumes_at_the_first_uncommitted_block(
    part: int, store: ObjectStore
) -> None:
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=1, report=crash_at(part))
    _, executor = execute(planned("gptq"), store, workers=2, keep_every=1)
    assert executor.solved_parts() == ALL_PARTS[part + 1 :]
    assert lasting(store) == expected("gptq")


@pytest.mark.parametrize("part", [0, 2])
def test_independent_parts_resume_too(part: int, store: ObjectStore) -> None:
    with pytest.raises(CrashError):
        execute(planned("int8"), store, report=crash_at(part))
    _, executor = execute(planned("int8"), store, workers=2)
    assert executor.solved_parts() == ALL_PARTS[part + 1 :]
    assert lasting(store) == expected("int8")


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("read", 2),
        ("restore", 1),
        ("restore", 2),
        ("capture", 2),
        ("capture", 3),
        ("merge", 1),
        ("merge", 7),
        ("send", 2),
        ("solve", 3),
        ("commit", 1),
        ("propagate", 1),
        ("propagate", 4),
        ("keep", 1),
        ("finalize", 1),
        ("quantize_alone", 1),
    ],
)
def test_a_lost_worker_costs_its_block_alone(method: str, number: int, store: ObjectStore) -> None:
    steps: list[Step] = []
    _, executor = execute(
        planned("gptq"),
        store,
        workers=2,
        keep_every=1,
        report=steps.append,
        lose=[(method, number)],
    )
    assert executor.calls[method] >= number
    assert [step.event for step in steps].count("lost") == 1
    assert len({step.part for step in steps if step.event == "committed"}) == NUM_BLOCKS + 1
    assert [step.event for step in steps].count("committed") == NUM_BLOCKS + 1
    assert lasting(store) == expected("gptq")


def test_a_worker_that_started_anew_unnoticed_is_given_its_shards_again(
    store: ObjectStore,
) -> None:
    """Ray restarts an actor between two calls, and neither of them fails."""
    steps: list[Step] = []
    execute(planned("gptq"), store, workers=2, report=steps.append, restart_after=1)
    assert [step.event for step in steps].count("lost") == 1
    assert lasting(store) == expected("gptq")


class RepeatingExecutor(CountingExecutor):
    """Runs every call twice, at once or some calls later, as happens when an answer is lost."""

    def __init__(self, make_worker: Callable[[], Worker], num_workers: int, lag: int) -> None:
        super().__init__(make_worker, num_workers)
        self._lag = lag
        self._submitted: list[tuple[int, Callable[..., Any], tuple[Any, ...]]] = []

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        self._submitted.append((worker, method, args))
        result = super().submit(worker, method, *args, **kwargs)
        if len(self._submitted) > self._lag:
            again, method, args = self._submitted[-1 - self._lag]
            late = super().submit(again, method, *args)
            return result if self._lag else late
        return result


@pytest.mark.parametrize("lag", by_default([0, 1, 2, 5], [0, 2]))
def test_every_call_may_be_carried_out_twice(lag: int, store: ObjectStore) -> None:
    given = planned("gptq")
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    executor = RepeatingExecutor(
        lambda: QuickWorker(given.plan, str(source()), store.root_url), num_workers=2, lag=lag
    )
    steps: list[Step] = []
    quantize(given.plan, store, executor, steps.append, keep_every=1)
    assert not any(step.event == "lost" for step in steps)
    assert executor.calls["capture"] > executor.calls["solve"] > executor.calls["propagate"] > 4
    assert lasting(store) == expected("gptq")


def test_workers_that_never_last_end_the_run(store: ObjectStore) -> None:
    with pytest.raises(ExecutorError, match="10 times without one more") as raised:
        execute(planned("gptq"), store, lose=[("finalize", n) for n in range(1, 100)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    by_default(["deleted", "flipped", "no index", "damaged index"], ["flipped", "no index"]),
)
def test_activations_that_are_gone_or_damaged_are_computed_again(
    damage: str, store: ObjectStore
) -> None:
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=1, report=crash_at(3))
    store.delete(record_key(3))
    for key in store.list("activations/"):
        is_index = key.endswith("index.json")
        if damage == "deleted" or (damage == "no index" and is_index):
            store.delete(key)
        if damage == "flipped" and not is_index:
            data = bytearray(store.get(key))
            data[-5] ^= 4
            store.put(key, bytes(data))
        if damage == "damaged index" and is_index:
            store.put(key, store.get(key)[:-3])
    _, executor = execute(planned("gptq"), store, keep_every=1)
    assert executor.solved_parts() == [3]
    [(_, start)] = [(m, a) for m, a in executor.done if m == "restore"]
    assert start == 2
    assert lasting(store) == expected("gptq")


def test_activations_that_an_interruption_left_unkept_are_kept_by_the_next_attempt(
    store: ObjectStore,
) -> None:
    """Else one that falls there again and again would have ever more blocks passed anew."""
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=2, report=crash_at(2))
    assert not store.list("activations/")
    steps: list[Step] = []
    execute(planned("gptq"), store, keep_every=2, report=steps.append)
    assert [step.part for step in steps if step.event == "kept"] == [2]
    assert lasting(store) == expected("gptq")


def test_old_activations_are_removed(store: ObjectStore) -> None:
    execute(planned("gptq"), store, keep_every=1)
    blocks = {key.split("/")[1] for key in store.list("activations/")}
    assert len(blocks) <= 2


@pytest.mark.parametrize(
    ("victim", "damage"), covering([file_key(2), record_key(2)], ["deleted", "flipped"])
)
def test_a_damaged_block_is_solved_again_and_nothing_else(
    victim: str, damage: str, store: ObjectStore
) -> None:
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=1, report=crash_at(3))
    if damage == "deleted":
        store.delete(victim)
    else:
        data = bytearray(store.get(victim))
        data[len(data) // 2] ^= 1
        store.put(victim, bytes(data))
    steps: list[Step] = []
    _, executor = execute(planned("gptq"), store, keep_every=1, report=steps.append)
    # Block 2 builds on block 1: its record names the one before, whose bytes are the same again.
    assert executor.solved_parts() == [2, 3]
    assert lasting(store) == expected("gptq")
    moved = store.list("quarantine/")
    assert bool(moved) == (damage == "flipped")


def test_a_finished_run_is_not_done_again(store: ObjectStore) -> None:
    execute(planned("gptq"), store)
    before = lasting(store)
    _, executor = execute(planned("gptq"), store)
    assert set(executor.calls) == {"finalize"}
    assert lasting(store) == before


def other_plan(change: str) -> Planned:
    given = planned("gptq")
    match change:
        case "recipe":
            return planned("awq")
        case "calibration":
            return planned("gptq", seed=1)
        case "source":
            plan = dataclasses.replace(given.plan, source_files_sha256="0" * 64)
            return dataclasses.replace(given, plan=plan)
    raise AssertionError(change)


@pytest.mark.parametrize("change", ["recipe", "calibration", "source"])
def test_another_plan_is_refused_and_nothing_is_touched(change: str, store: ObjectStore) -> None:
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, report=crash_at(1))
    before = {key: store.get(key) for key in store.list()}
    with pytest.raises(PlanMismatchError, match="another run") as raised:
        execute(other_plan(change), store)
    assert "--output" in str(raised.value)
    named = {"recipe": "recipe", "calibration": "tokens", "source": "source_digest"}[change]
    assert named in str(raised.value)
    assert {key: store.get(key) for key in store.list()} == before


@pytest.mark.parametrize("foreign", ["thesis.txt", "artifact/config.json", "events/1.jsonl"])
def test_an_output_that_holds_other_things_is_refused(foreign: str, tmp_path: Path) -> None:
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    store = open_store(str(tmp_path))
    given = planned("gptq")
    assert given.windows is not None
    with pytest.raises(PlanMismatchError, match="empty --output"):
        claim(store, given.plan, given.windows.to_bytes())
    assert store.list() == (foreign,)


def test_where_the_source_lies_is_not_the_plan(store: ObjectStore) -> None:
    given = planned("gptq").plan
    claim(store, given)
    moved = dataclasses.replace(given, source_url="s3://elsewhere/preset")
    assert claim(store, moved) == given


def test_a_claimed_run_has_its_tokens(store: ObjectStore) -> None:
    """So that `resume`, which reads no texts, can go on from any moment on."""
    given = planned("gptq")
    assert given.windows is not None
    assert given.plan.tokens is not None
    order: list[str] = []
    create = type(store.backend).create

    class Watched(type(store.backend)):  # type: ignore[misc]
        def create(self, key: str, data: bytes) -> None:
            order.append(key)
            create(store.backend, key, data)

    watched = ObjectStore(store.root_url, Watched("unused"))
    claim(watched, given.plan, given.windows.to_bytes())
    assert order == [given.plan.tokens.key, PLAN_KEY]


def test_what_was_read_once_is_not_read_again_whenever_a_worker_is_lost(
    store: ObjectStore,
) -> None:
    """A lost worker costs its block, not another look at all blocks before it."""
    with pytest.raises(CrashError):
        execute(planned("gptq"), store, keep_every=1, report=crash_at(2))
    reads: list[str] = []

    class Watched(type(store.backend)):  # type: ignore[misc]
        def read_range(self, key: str, start: int, stop: int) -> bytes:
            reads.append(key)
            return super().read_range(key, start, stop)

    root = store.root_url.removeprefix("memory://")
    watched = ObjectStore(store.root_url, Watched(root))
    execute(planned("gptq"), watched, keep_every=1, lose=[("solve", 1), ("solve", 3)])
    assert reads.count(file_key(1)) == 1
    assert lasting(store) == expected("gptq")
