"""Where a batch stands decides what is still to be done, and never what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.worker.calibration_shards import Batch, CalibrationShards, LostShardError


class Counting:
    """A block of two groups: stages that add a weight each, and are counted."""

    groups = ("first", "second")

    def __init__(self) -> None:
        self.run: list[int] = []
        self.fails = False

    def start(self, hidden_states: Any, side_inputs: Sequence[Any]) -> tuple[Any, ...]:
        return (hidden_states,)

    def advance(self, stage: int, weights: Sequence[Any], live: tuple[Any, ...]) -> Any:
        if self.fails:
            raise RuntimeError
        self.run.append(stage)
        result = live[0] * 10 + weights[stage]
        return result, (result,)


def batch() -> Batch:
    return Batch(hidden_states=np.ones(1, np.float32), side_inputs=[], mask=np.ones(1, bool))


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
def test_only_what_is_due_is_run(asked: list[int], run: list[int]) -> None:
    program, one = Counting(), batch()
    for stage in asked:
        result = one.pass_through(program, stage, [1, 2, 3])  # type: ignore[arg-type]
        assert result == [11, 112, 1123][stage]
    assert program.run == run


def test_a_batch_that_failed_goes_on_from_where_it_was() -> None:
    program, one = Counting(), batch()
    one.pass_through(program, 0, [1, 2, 3])  # type: ignore[arg-type]
    program.fails = True
    with pytest.raises(RuntimeError):
        one.leave(program, [1, 2, 3])  # type: ignore[arg-type]
    program.fails = False
    one.leave(program, [1, 2, 3])  # type: ignore[arg-type]
    assert (one.block, one.stage, one.live, one.hidden_states) == (1, 0, None, 1123)
    assert program.run == [0, 1, 2]


def test_a_shard_that_left_in_part_is_in_neither_block_and_can_leave_in_full() -> None:
    shards, batches, program = CalibrationShards(), [batch(), batch()], Counting()
    shards.put(7, batches)
    assert shards.stand_in(7, 0)
    batches[0].leave(program, [1, 2, 3])  # type: ignore[arg-type]
    for block in (0, 1):
        assert not shards.stand_in(7, block)
        with pytest.raises(LostShardError, match=r"shard 7 .* in \[0, 1\]"):
            shards.inside(7, block)
    assert list(shards.leaving(7, 0)) == [batches[1]]
    batches[1].leave(program, [1, 2, 3])  # type: ignore[arg-type]
    assert shards.inside(7, 1) == batches
    assert list(shards.leaving(7, 0)) == []
    with pytest.raises(LostShardError, match=r"shard 8 .* nowhere"):
        shards.leaving(8, 0)
