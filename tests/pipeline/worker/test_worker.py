"""A worker's results depend on storage and its arguments alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.canonical import sha256
from pipeline.errors import DivergenceError, MissingObjectError
from pipeline.run import activations
from pipeline.run.claim import claim
from pipeline.run.records import FileDigest, PartRecord, file_key, record_key
from pipeline.run.solved_layers import SolvedLayer
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.shards import LostShardError
from pipeline.worker.worker import Worker
from quantizer import CalibrationStatistics
from tests.pipeline.tiny_runs import (
    QuickWorker,
    captured,
    execute,
    planned,
    source,
    statistics_of,
)

_fresh = iter(range(1_000_000))


@pytest.fixture
def store() -> ObjectStore:
    found = open_store(f"memory://test-worker/{next(_fresh)}")
    given = planned("gptq")
    assert given.windows is not None
    claim(found, given.plan, given.windows.to_bytes())
    return found


def worker_of(store: ObjectStore) -> Worker:
    return QuickWorker(planned("gptq").plan, str(source()), store.root_url)


def finished(store: ObjectStore) -> ObjectStore:
    execute(planned("gptq"), store, keep_every=1)
    return store


def hidden_states(worker: Worker, index: int) -> list[np.ndarray]:
    graph = worker._model.graph
    batches = worker._shards._held[index]
    return [
        batch.values[(*graph.carried(graph.calls[batch.block]), *graph.calls[batch.block].takes)[0]]
        for batch in batches
    ]


def test_every_token_of_the_windows_is_counted_and_no_other() -> None:
    """18 windows make 16 and 2, and the 2 are filled up to a micro-batch of 4."""
    given = planned("gptq", num_samples=18)
    assert given.windows is not None
    assert given.plan.tokens is not None
    assert given.plan.tokens.shards == ((0, 16), (16, 18))
    assert given.plan.tokens.micro_batch == 4
    # Micro-batches of one window, so that none is filled up.
    single = dataclasses.replace(given.plan.tokens, micro_batch=1)
    sums = []
    for plan in (given.plan, dataclasses.replace(given.plan, tokens=single)):
        store = open_store(f"memory://test-worker/{next(_fresh)}")
        claim(store, plan, given.windows.to_bytes())
        worker = QuickWorker(plan, str(source()), store.root_url)
        worker.restore(0, [0, 1], 0)
        sums.append(captured(worker, 0, 0, range(2), worker.read(1)))
    filled, plain = sums
    assert filled.num_rows == plain.num_rows == 18 * 128
    assert (filled.gram_CC == filled.gram_CC.T).all()
    np.testing.assert_allclose(filled.gram_CC, plain.gram_CC, rtol=1e-4, atol=1e-2)


def test_a_subtree_is_the_merge_of_its_shards(store: ObjectStore) -> None:
    values = worker_of(store).read(1)
    first, second = worker_of(store), worker_of(store)
    held = []
    for shard, one in enumerate((first, second)):
        one.restore(0, [shard], 0)
        held.append(one.capture(0, 0, range(shard, shard + 1), values))
    whole = worker_of(store)
    whole.restore(0, [0, 1], 0)
    expected = captured(whole, 0, 0, range(2), values)
    merged = statistics_of(first, first.merge(*held, second.send(held[1])))
    assert (merged.gram_CC == expected.gram_CC).all()
    assert merged.num_rows == expected.num_rows


@pytest.mark.parametrize("start", [0, 1, 2])
def test_shards_are_restored_to_the_same_bits_from_wherever(start: int, store: ObjectStore) -> None:
    finished(store)
    kept = activations.load(store, 2, 1)
    worker = worker_of(store)
    if start:
        # The set of block 1 is still there, since the last but one is never deleted.
        assert activations.latest(store, start, 2) == start
    worker.restore(2, [1], start)
    for found, [expected] in zip(hidden_states(worker, 1), kept, strict=True):
        assert found.dtype == expected.dtype
        assert (found == expected).all()


def test_work_can_be_repeated_without_harm(store: ObjectStore) -> None:
    worker = worker_of(store)
    done = worker.quantize_alone(0)
    assert worker.quantize_alone(0) == done
    assert worker_of(store).quantize_alone(0) == done
    assert FileDigest.of(store.get(file_key(0))) == done.record.files[file_key(0)]


def test_other_bytes_under_a_committed_name_are_refused(store: ObjectStore) -> None:
    store.create(file_key(0), b"of another execution")
    with pytest.raises(DivergenceError, match="nothing was overwritten"):
        worker_of(store).quantize_alone(0)
    assert store.get(file_key(0)) == b"of another execution"
    assert not store.exists(record_key(0))


def test_the_error_names_the_shard_that_a_worker_lacks(store: ObjectStore) -> None:
    worker = worker_of(store)
    values = worker.read(1)
    with pytest.raises(LostShardError, match="shard 1"):
        worker.capture(0, 0, range(1, 2), values)
    worker.restore(0, [1], 0)
    with pytest.raises(LostShardError, match="shard 1 is needed in block 1"):
        worker.capture(1, 0, range(1, 2), worker.read(2))
    with pytest.raises(LostShardError, match="shard 1"):
        worker.propagate(1, [1], worker.read(2))
    with pytest.raises(LostShardError, match="shard 1"):
        worker.keep(1, [1])


def same(left: CalibrationStatistics, right: CalibrationStatistics) -> bool:
    return np.array_equal(left.gram_CC, right.gram_CC) and left.num_rows == right.num_rows


def test_stages_can_be_repeated_in_any_order(store: ObjectStore) -> None:
    """As when calls are repeated, and the first of two arrives last."""
    plan = planned("gptq").plan
    groups, layers = plan.parts[1].groups, plan.parts[1].layers
    paths = {layer.name: layer.path for layer in layers}
    steady, shaken = worker_of(store), worker_of(store)
    for worker in (steady, shaken):
        worker.restore(0, [0], 0)
    values = steady.read(1)
    solved: list[list[SolvedLayer]] = []
    totals = []
    for stage, group in enumerate(groups):
        held = steady.capture(0, stage, range(1), values, *solved)
        totals.append(statistics_of(steady, held))
        for again in [*range(stage, -1, -1), stage]:
            found = captured(shaken, 0, again, range(1), values, *solved[:again])
            assert same(found, totals[again])
        chosen = [paths[name] for name in group.targets]
        solved.append(steady.solve(1, chosen, values, held))
    steady.propagate(0, [0], values, *solved)
    shaken.restore(0, [0], 0)
    for _ in range(2):
        shaken.propagate(0, [0], values, *solved)
    for left, right in zip(hidden_states(steady, 0), hidden_states(shaken, 0), strict=True):
        assert (left == right).all()
    assert steady.keep(1, [0]) == shaken.keep(1, [0])


def test_a_shard_inside_its_block_is_restored_without_reading(store: ObjectStore) -> None:
    worker = worker_of(store)
    worker.restore(0, [0], 0)
    values = worker.read(1)
    first = captured(worker, 0, 0, range(1), values)
    tokens = planned("gptq").plan.tokens
    assert tokens is not None
    store.delete(tokens.key)
    worker.restore(0, [0], 0)
    assert same(captured(worker, 0, 0, range(1), values), first)
    with pytest.raises(MissingObjectError):
        worker.restore(0, [0, 1], 0)


def test_a_worker_gives_up_the_shards_that_are_others_now(store: ObjectStore) -> None:
    """As where fewer workers are left, among which shards are divided anew."""
    worker = worker_of(store)
    worker.restore(0, [0], 0)
    values = worker.read(1)
    worker.capture(0, 0, range(1), values)
    worker.restore(0, [1], 0)
    with pytest.raises(LostShardError, match="shard 0 is needed in block 0, but not held here"):
        worker.capture(0, 0, range(1), values)
    captured(worker, 0, 0, range(1, 2), values)


def test_a_record_names_every_layer_and_the_block_before(store: ObjectStore) -> None:
    manifest, _ = execute(planned("gptq"), store)
    previous = ""
    for part in planned("gptq").plan.parts[1:]:
        data = store.get(record_key(part.part))
        record = PartRecord.from_json(data)
        assert record.previous == previous
        assert [layer.path for layer in record.layers] == [layer.path for layer in part.layers]
        for layer in record.layers:
            assert layer.account is not None
            assert layer.account["output_error"] <= layer.account["rtn_output_error"] * (1 + 1e-6)
        previous = sha256(data)
    assert set(manifest.records) == {record_key(p.part) for p in planned("gptq").plan.parts}
