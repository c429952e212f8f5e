"""Where a plan has it, the float model's activations go beside the quantized model's, bit for bit.

Each is what a worker has that knows of no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run import activations
from pipeline.run.claim import claim
from pipeline.run.commits import committed_file
from pipeline.run.driver import quantize
from pipeline.run.records import RECORDS_PREFIX, PartRecord
from pipeline.run.solved_layers import SolvedLayer
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.shards import LostShardError, MicroBatch
from pipeline.worker.statistics import judged_drift
from pipeline.worker.worker import Worker
from quantizer.schemes import GPTQScheme
from tests.families.tiny_families import shared_family
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import (
    NUM_BLOCKS,
    CrashError,
    QuickWorker,
    captured,
    correcting_drift,
    crash_at,
    execute,
    lasting,
    model_state,
    planned,
    source,
    statistics_of,
    text_file,
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
    found, _ = model.committed(block + 1, committed_file(finished(), block + 1))
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
    one = both(1)
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


def rows_of(batches: list[MicroBatch], one: QuickWorker, stage: int, weights: Any) -> Any:
    """What the layers of a block's group are given, float64, [rows, in_features]."""
    call = one._model.call(1)
    program = one._passage.program(1, batches[0])
    size = program.groups[stage].in_features
    found = [batch.run_stage(call, program, stage, weights)[0] for batch in batches]
    return np.concatenate([np.asarray(x, np.float64).reshape(-1, size) for x in found])


def test_the_drift_is_between_what_the_float_and_the_quantized_layers_are_given() -> None:
    """x comes from float layers alone, and x̃ from quantized ones, those of its own block too."""
    plan = correcting_drift(planned("gptq").plan)
    assert plan.tokens is not None
    plan = dataclasses.replace(plan, tokens=dataclasses.replace(plan.tokens, held_back_every=5))
    one = QuickWorker(plan, str(source()), finished().root_url)
    one.restore(0, [0, 1], 0)
    one.propagate(0, [0, 1], one.read(1), solved(0))
    values, stored = one.read(2), solved(1)
    stage = next(i for i, group in enumerate(plan.parts[2].groups) if "output" in group.targets[0])
    held = one.capture(1, stage, range(2), values, stored)
    found = judged_drift(one.send(held))
    assert found is not None
    batches = [x for shard in (0, 1) for x in one._shards.get(shard, 1)]
    quantized = one._weights.of(1, values, {x.path: x.variables for x in stored})
    in_float = one._weights.of(1, values, {})
    assert [batch.held_back for batch in batches] == [False, False, False, False, True]
    x_tilde = rows_of(batches, one, stage, quantized)
    x = rows_of([b.in_float for b in batches if b.in_float], one, stage, in_float)
    fitted = 16 * 128
    for drift, rows in ((found.drift, slice(fitted)), (found.held_back.drift, slice(fitted, None))):
        expected = (x[rows] - x_tilde[rows]).T @ x_tilde[rows]
        assert drift.num_rows == len(x[rows])
        assert np.linalg.norm(drift.cross_CC - expected) <= 1e-5 * np.linalg.norm(expected)
    alone = worker(in_float=False)
    alone.restore(0, [0, 1], 0)
    alone.propagate(0, [0, 1], alone.read(1), solved(0))
    plain = captured(alone, 1, stage, range(2), values, stored)
    whole = statistics_of(one, held)
    np.testing.assert_allclose(whole.gram_CC, plain.gram_CC, rtol=1e-4, atol=1e-3)


@cache
def expected() -> dict[str, bytes]:
    """What one worker leaves of a run that corrects drift."""
    store = open_store(f"memory://test-float-stream/{next(_fresh)}")
    execute(planned("drift"), store)
    return lasting(store)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case",
    [
        (2, ()),
        (3, (("capture", 3), ("propagate", 2), ("solve", 9))),
        (3, (("keep", 1), ("propagate", 3), ("send", 2))),
        (2, (("restore", 2), ("merge", 7), ("propagate", 1))),
    ],
)
def test_runs_that_correct_drift_leave_the_same_bytes(
    case: tuple[int, tuple[tuple[str, int], ...]],
) -> None:
    workers, lose = case
    store = open_store(f"memory://test-float-stream/{next(_fresh)}")
    execute(planned("drift"), store, workers=workers, keep_every=1, lose=lose)
    assert lasting(store) == expected()


def test_a_driver_that_crashed_resumes_both_models() -> None:
    store = open_store(f"memory://test-float-stream/{next(_fresh)}")
    with pytest.raises(CrashError):
        execute(planned("drift"), store, keep_every=1, report=crash_at(2))
    execute(planned("drift"), store, workers=2, keep_every=1)
    assert lasting(store) == expected()


def test_records_say_what_was_corrected_and_what_that_is_worth_on_other_windows() -> None:
    layers = [
        layer
        for key, data in expected().items()
        if key.startswith(RECORDS_PREFIX + "block")
        for layer in PartRecord.from_json(data).layers
        if layer.account
    ]
    assert len(layers) == 7 * NUM_BLOCKS
    judged = [layer.account["drift"] for layer in layers if layer.account]
    # What enters the first block is the same in both models.
    assert [one["strength"] for one in judged[:3]] == [0.0, 0.0, 0.0]
    assert all(one["strength"] > 0.2 for one in judged[3:])
    assert all(one["held_back_error"] < one["uncorrected_error"] for one in judged[3:])


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["Bart", "Gemma3 with vision", "Mixtral"])
def test_other_models_pass_in_float_too(family: str) -> None:
    """An encoder–decoder, one that sees, and one of experts, whose banks are not corrected."""
    preset = shared_family(family)
    scheme = GPTQScheme(weight_bits=2, group_size=16, scale_search=False, drift_correction=1.0)
    wanted = Calibration(texts=(str(text_file()),), num_samples=40, sequence_length=24)
    recipe = Recipe(name="test", scheme=scheme, calibration=wanted)
    given = make_plan(read_preset(str(preset)), recipe, threads=1)
    assert given.windows is not None
    store = open_store(f"memory://test-float-stream/{next(_fresh)}")
    claim(store, given.plan, given.windows.to_bytes())
    one = Worker(given.plan, str(preset), store.root_url)
    quantize(given.plan, store, LocalExecutor([one]), lambda step: None)
    last = given.plan.num_blocks - 1
    for_all = range(len(given.plan.tokens.shards))  # type: ignore[union-attr]
    one.restore(last, for_all, 0)
    plain = Worker(given.plan, str(preset), store.root_url)
    plain.restore(0, for_all, 0)
    for done in range(last):
        plain.propagate(done, for_all, plain.read(done + 1))
    for index in for_all:
        assert same(in_float(one._shards.get(index, last)), plain._shards.get(index, last))
        assert not same(one._shards.get(index, last), plain._shards.get(index, last))
    for part in given.plan.parts[1:]:
        for layer in part.layers:
            if layer.experts and layer.scheme:
                assert not layer.corrects_drift
                assert "no drift_correction for experts" in layer.note
