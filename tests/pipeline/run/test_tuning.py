"""Blocks that are trained leave the same bytes whoever trains them, and are never worse for it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.commits import committed_file
from pipeline.run.records import PartRecord, TuningRecord, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.tune import norm_paths, schedule_of
from quantizer.tuning.training import token_errors
from tests.families.tiny_families import shared_family
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    CrashError,
    QuickWorker,
    crash_at,
    execute,
    lasting,
    recipe,
    source,
)
from tests.selection import by_default

_fresh = iter(range(1_000_000))


def fresh() -> ObjectStore:
    return open_store(f"memory://test-tuning/{next(_fresh)}")


@cache
def tuned(architecture: str = "Llama3", **settings: float) -> Planned:
    """Two bits, two shards, of four micro-batches and one; the last is held back."""
    of_experts = architecture == "Qwen3Moe"
    wanted = recipe("gptq").to_dict() | {
        "scheme": {"mode": "gptq", "weight_bits": 2, "group_size": 16 if of_experts else 32},
        "tuning": {"steps": 30, "batch": 4, "offset_rate": 0.05, "scale_rate": 0.001, **settings},
    }
    preset = read_preset(str(shared_family(architecture) if of_experts else source(architecture)))
    return make_plan(preset, recipe_from_dict(wanted), threads=2)


@cache
def expected() -> dict[str, bytes]:
    """What one worker leaves when nothing happens."""
    return lasting(finished())


@cache
def finished(architecture: str = "Llama3") -> ObjectStore:
    store = fresh()
    execute(tuned(architecture), store)
    return store


def records(store: ObjectStore) -> list[TuningRecord]:
    blocks = range(read_plan(store).num_blocks)
    found = [PartRecord.read(store, record_key(block + 1)).tuning for block in blocks]
    assert None not in found
    return [one for one in found if one is not None]


@pytest.mark.exhaustive
def test_one_worker_of_two_is_lost_and_the_run_resumes_to_the_same_bytes() -> None:
    store = fresh()
    with pytest.raises(CrashError):
        execute(tuned(), store, workers=2, report=crash_at(2))
    _, executor = execute(tuned(), store, workers=2, lose=[("tune", 1)])
    assert executor.calls["windows"] >= 1
    assert lasting(store) == expected()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("workers", "method"), [(2, "windows"), (3, "tune"), (3, "propagate"), (2, "capture")]
)
def test_any_workers_leave_the_same_bytes_though_one_is_lost(workers: int, method: str) -> None:
    store = fresh()
    _, executor = execute(tuned(), store, workers=workers, lose=[(method, 2)], keep_every=1)
    assert executor.calls["tune"] >= NUM_BLOCKS
    assert lasting(store) == expected()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("part", "keep_every"), [(0, 8), (1, 1), (2, 8), (3, 1)])
def test_a_crash_costs_a_block_at_most(part: int, keep_every: int) -> None:
    store = fresh()
    with pytest.raises(CrashError):
        execute(tuned(), store, workers=2, report=crash_at(part), keep_every=keep_every)
    _, executor = execute(tuned(), store, workers=1, restart_after=part + 1)
    assert executor.solved_parts()[-1:] in ([], [NUM_BLOCKS])
    assert executor.calls["tune"] <= NUM_BLOCKS + 1 - part
    assert lasting(store) == expected()


@pytest.mark.parametrize(
    "architecture", by_default(["Llama3", "Gemma", "GPT2", "Qwen3Moe"], ["Llama3"])
)
def test_the_better_is_kept_and_is_what_the_artifact_holds(architecture: str) -> None:
    """A record names the error of its file, decoded as stock Keras does, on held-back windows."""
    store, plan = finished(architecture), tuned(architecture).plan
    found = records(store)
    if architecture == "Llama3":
        assert {one.kept for one in found} == {"solved", "tuned"}
    worker = QuickWorker(plan, plan.source_url, store.root_url)
    assert plan.tokens is not None
    shards = list(range(len(plan.tokens.shards)))
    for block, record in enumerate(found):
        assert record.solved_error is not None
        assert record.tuned_error is not None
        assert (record.kept == "tuned") == (record.tuned_error < record.solved_error)
        worker.restore(block, shards, 0)
        values = worker.read(block + 1)
        batches = worker.windows(block, shards, values).batches
        solved, floats = worker._model.committed(block + 1, committed_file(store, block + 1))
        weights = worker._weights.of(block, values, solved, floats)
        call = worker._model.call(block)
        total = count = 0.0
        for number in schedule_of(plan, block).held_back:
            batch = batches[number]
            program = worker._model.program(worker._model.graph.blocks[block], batch.taken)
            live = batch.taken
            for stage in range(len(program.groups) + 1):
                given, live = program.run_stage(stage, weights, live)
            assert len(given) == len(call.gives) == 1
            total += float(token_errors(given[0], batch.targets[0], batch.masks[0]))
            count += int(batch.masks[0].sum())
        assert count == record.num_tokens
        kept = record.tuned_error if record.kept == "tuned" else record.solved_error
        assert total / count == pytest.approx(kept, rel=1e-4)
        norms = norm_paths(worker._model.graph.blocks[block])
        assert len(norms) >= 2
        changed = {path for path in norms if not np.array_equal(floats[path], values[path])}
        assert changed == record.norms.keys()
        assert bool(changed) == (record.kept == "tuned")


@pytest.mark.exhaustive
def test_training_that_makes_it_worse_is_not_kept() -> None:
    given, store = tuned(offset_rate=1.0, scale_rate=1.0, norm_rate=1.0), fresh()
    execute(given, store)
    found = records(store)
    assert {one.kept for one in found} == {"solved"}
    plain = make_plan(
        read_preset(str(source())),
        recipe_from_dict(
            {n: value for n, value in given.plan.recipe.to_dict().items() if n != "tuning"}
        ),
        threads=2,
    )
    untuned = fresh()
    execute(plain, untuned)
    for block in range(NUM_BLOCKS):
        assert committed_file(store, block + 1) == committed_file(untuned, block + 1)
