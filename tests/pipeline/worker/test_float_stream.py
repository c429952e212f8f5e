"""Where a plan has it, the float model's activations go beside the quantized model's, bit for bit.

Each is what a worker has that knows of no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.run import activations
from pipeline.run.commits import committed_file
from pipeline.run.worker_api import SolvedLayer
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.shards import LostShardError, MicroBatch
from tests.pipeline.tiny_runs import (
    QuickWorker,
    correcting_drift,
    execute,
    model_state,
    planned,
    source,
)

_fresh = iter(range(1_000_000))


@cache
def finished() -> ObjectStore:
    """A run without a float stream."""
    store = open_store(f"memory://test-float-stream/{next(_fresh)}")
    execute(planned("gptq"), store, keep_every=1)
    return store


def worker(*, in_float: bool) -> QuickWorker:
    plan = planned("gptq").plan
    return QuickWorker(
        correcting_drift(plan) if in_float else plan, str(source()), finished().root_url
    )


def solved(block: int) -> list[SolvedLayer]:
    """The layers that were committed."""
    model = model_state(planned("gptq").plan.to_json(), str(source()))
    found = model.solved_variables(block + 1, committed_file(finished(), block + 1))
    return [SolvedLayer(path=path, variables=found[path], report={}) for path in found]


def values_of(batches: list[MicroBatch]) -> list[Mapping[int, NDArray[Any]]]:
    return [{n: np.asarray(a) for n, a in batch.values.items()} for batch in batches]


def same(found: list[MicroBatch], expected: list[MicroBatch]) -> bool:
    ours, theirs = values_of(found), values_of(expected)
    return [{n: a.tobytes() for n, a in one.items()} for one in ours] == [
        {n: a.tobytes() for n, a in one.items()} for one in theirs
    ]


def held(one: QuickWorker, index: int, block: int) -> list[MicroBatch]:
    return one._shards.get(index, block)


def in_float(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [batch.in_float for batch in batches if batch.in_float is not None]


@cache
def alone(block: int, *, of_float_model: bool) -> list[MicroBatch]:
    """Shard 0 where it enters a block, of a worker that knows one model."""
    one = worker(in_float=False)
    one.restore(0, [0], 0)
    for done in range(block):
        given = [] if of_float_model else [solved(done)]
        one.propagate(done, [0], one.read(done + 1), *given)
    return held(one, 0, block)


def both(block: int) -> QuickWorker:
    one = worker(in_float=True)
    one.restore(0, [0], 0)
    for done in range(block):
        one.propagate(done, [0], one.read(done + 1), solved(done))
    return one


def test_both_models_begin_with_the_same_arrays() -> None:
    batches = held(both(0), 0, 0)
    assert len(in_float(batches)) == len(batches) > 1
    for batch in batches:
        assert batch.in_float is not None
        assert all(batch.in_float.values[n] is batch.values[n] for n in batch.values)


def test_each_goes_through_its_own_model() -> None:
    batches = held(both(2), 0, 2)
    assert same(batches, alone(2, of_float_model=False))
    assert same(in_float(batches), alone(2, of_float_model=True))
    assert not same(in_float(batches), batches)


def test_they_are_one_set_in_storage_and_resume_from_it_or_from_the_tokens() -> None:
    store = finished()
    expected = both(2)
    saved = expected.keep(2, [0])
    activations.finish(store, 2, saved)
    for start in (0, 2):
        one = worker(in_float=True)
        one.restore(2, [0], start)
        assert same(held(one, 0, 2), held(expected, 0, 2))
        assert same(in_float(held(one, 0, 2)), in_float(held(expected, 0, 2)))


def test_what_left_a_block_in_one_model_alone_is_made_anew_or_finished() -> None:
    one, values = both(1), None
    values = one.read(2)
    batch = held(one, 0, 1)[-1]
    assert batch.in_float is not None
    batch.in_float.block = 2
    with pytest.raises(LostShardError, match=r"is in \[1, 2\]"):
        one.capture(1, 0, range(1), values)
    batch.in_float.block = 1
    entered = batch.in_float.values

    class FailsOnceError(Exception):
        pass

    def fail(*args: Any) -> Any:
        raise FailsOnceError

    batch.finish_block = fail  # type: ignore[method-assign]
    with pytest.raises(FailsOnceError):
        one.propagate(1, [0], values, solved(1))
    assert (batch.in_float.block, batch.block) == (2, 1)
    assert entered is not batch.in_float.values
    del batch.finish_block  # type: ignore[method-assign]
    one.propagate(1, [0], values, solved(1))
    assert same(held(one, 0, 2), alone(2, of_float_model=False))
    assert same(in_float(held(one, 0, 2)), alone(2, of_float_model=True))


def test_a_repeated_restore_goes_back_in_both_models() -> None:
    one = both(1)
    for batch in held(one, 0, 1):
        for stream in batch.streams:
            stream.stage = 1
    one.restore(1, [0], 0)
    assert {x.stage for batch in held(one, 0, 1) for x in batch.streams} == {0}
