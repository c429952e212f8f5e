"""Where a micro-batch is decides which stages still run, and never their results."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from pipeline.worker.activation_memory import ActivationMemory
from pipeline.worker.devices import Devices
from pipeline.worker.shards import CalibrationShards, LostShardError, MicroBatch


class Counting:
    """A block of two groups: stages that add a weight each, and are counted.

    Attributes:
        large: the stages that leave too much to be kept.
    """

    groups = ("first", "second")

    def __init__(self, large: Sequence[int] = ()) -> None:
        self.run: list[int] = []
        self.fails = False
        self.large = large

    def leaves_little(self, stage: int) -> bool:
        return stage not in self.large

    def run_stage(self, stage: int, weights: Sequence[Any], live: tuple[Any, ...]) -> Any:
        if self.fails:
            raise RuntimeError
        self.run.append(stage)
        result = live[0] * 10 + weights[stage]
        return (result,), (result,)


def batch() -> MicroBatch:
    values = {0: jnp.ones(1)}
    return MicroBatch(
        values=values,
        batch=SimpleNamespace(),
        memory=ActivationMemory("device", Devices.of_this_process()),
    )  # type: ignore[arg-type]


CALL: Any = SimpleNamespace(takes=(0,), gives=(1,))


def finish(one: MicroBatch, program: Any) -> None:
    one.enter(one.block + 1, one.finish_block(CALL, program, [1, 2, 3]))


@pytest.mark.parametrize(
    ("asked", "run"),
    [
        ([0, 1], [0, 1]),
        ([0, 0, 1], [0, 0, 1]),
        ([0, 1, 0, 1], [0, 1, 0, 1]),
        ([1], [0, 1]),
        ([0, 1, 0, 2], [0, 1, 0, 1, 2]),
    ],
)
def test_only_stages_that_are_due_run(asked: list[int], run: list[int]) -> None:
    program, one = Counting(), batch()
    for stage in asked:
        [result] = one.run_stage(CALL, program, stage, [1, 2, 3])  # type: ignore[arg-type]
        assert result == [11, 112, 1123][stage]
    assert program.run == run


def test_a_stage_that_leaves_too_much_to_be_kept_runs_for_each_use() -> None:
    program, one = Counting(large=[1]), batch()
    for stage in (0, 1, 1, 2):
        [result] = one.run_stage(CALL, program, stage, [1, 2, 3])  # type: ignore[arg-type]
        assert result == [11, 112, 1123][stage]
        assert one.stage == (1 if stage < 2 else 3)
        assert one.live == ((11,) if stage < 2 else (1123,))
    assert program.run == [0, 1, 1, 1, 2]


def test_a_micro_batch_whose_stage_failed_continues_from_there() -> None:
    program, one = Counting(), batch()
    one.run_stage(CALL, program, 0, [1, 2, 3])  # type: ignore[arg-type]
    program.fails = True
    with pytest.raises(RuntimeError):
        finish(one, program)
    program.fails = False
    finish(one, program)
    assert (one.block, one.stage, one.live, one.values[1]) == (1, 0, (), 1123)
    assert program.run == [0, 1, 2]


def test_a_shard_that_finished_a_block_in_part_is_in_neither_and_can_finish_it() -> None:
    shards, batches, program = CalibrationShards(), [batch(), batch()], Counting()
    shards.put(7, batches)
    assert shards.has(7, 0)
    finish(batches[0], program)
    for block in (0, 1):
        assert not shards.has(7, block)
        with pytest.raises(LostShardError, match=r"shard 7 .* is in \[0, 1\]"):
            shards.get(7, block)
    assert list(shards.unfinished(7, 0)) == [batches[1]]
    finish(batches[1], program)
    assert shards.get(7, 1) == batches
    assert list(shards.unfinished(7, 0)) == []
    with pytest.raises(LostShardError, match=r"shard 8 .* not held here"):
        shards.unfinished(8, 0)
