"""The calibration shards that a worker holds, and how far through the blocks each has come.

A micro-batch keeps what entered its block until it has passed it, so it can go back within the
block at any time. A call that is repeated, or comes late, therefore does no harm: a stage that runs
again, with the weights that later stages are given, has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.executor.protocol import WorkerLostError
from pipeline.worker.block_program import BlockProgram


class LostShardError(WorkerLostError):
    """A restarted worker was asked for a shard that it has not restored."""


@dataclass
class MicroBatch:
    """Windows that pass the blocks together.

    Attributes:
        hidden_states: [micro_batch, sequence, hidden], float32: what enters the block.
        side_inputs: the blocks' other inputs.
        mask: [micro_batch, sequence], bool: where there is text.
        block, stage: the block that it is in, and the next stage of that block.
        live: what that stage begins with.
    """

    hidden_states: NDArray[np.float32]
    side_inputs: list[NDArray[Any]]
    mask: NDArray[np.bool_]
    block: int = 0
    stage: int = 0
    live: tuple[Any, ...] = ()

    def rewind(self) -> None:
        """Go back to where it entered its block."""
        self.stage, self.live = 0, ()

    def run_stage(self, program: BlockProgram, stage: int, weights: Sequence[Any]) -> Any:
        """Run the block up to this stage, and return the stage's result.

        Args:
            weights: of the whole block, quantized up to this stage.
        """
        if self.stage > stage:
            self.rewind()
        if self.stage == 0:
            self.live = (self.hidden_states, *self.side_inputs)
        while self.stage <= stage:
            result, self.live = program.run_stage(self.stage, weights, self.live)
            self.stage += 1
        return result

    def finish_block(self, program: BlockProgram, weights: Sequence[Any]) -> None:
        """Run the rest of the block, and enter the next one."""
        output = self.run_stage(program, len(program.groups), weights)
        self.hidden_states = np.asarray(output)
        self.block += 1
        self.rewind()


class CalibrationShards:
    """A worker's shards, by index."""

    def __init__(self) -> None:
        self._held: dict[int, list[MicroBatch]] = {}

    def put(self, index: int, batches: list[MicroBatch]) -> None:
        self._held[index] = batches

    def has(self, index: int, block: int) -> bool:
        """Whether all of a shard is in `block`."""
        held = self._held.get(index)
        return held is not None and all(batch.block == block for batch in held)

    def get(self, index: int, block: int) -> list[MicroBatch]:
        """A shard, all of which is in `block`.

        Raises:
            LostShardError: it is elsewhere, or not held at all.
        """
        return list(self._between(index, block, block))

    def unfinished(self, index: int, block: int) -> Iterator[MicroBatch]:
        """The micro-batches of a shard that have not finished `block`; the others just have.

        Raises:
            LostShardError: any is elsewhere.
        """
        held = self._between(index, block, block + 1)
        return (batch for batch in held if batch.block == block)

    def _between(self, index: int, first: int, last: int) -> list[MicroBatch]:
        held = self._held.get(index)
        if held is None:
            raise LostShardError(f"shard {index} is needed in block {first}, but not held here")
        blocks = sorted({batch.block for batch in held})
        if not first <= blocks[0] <= blocks[-1] <= last:
            raise LostShardError(f"shard {index} is needed in block {first}, but is in {blocks}")
        return held
