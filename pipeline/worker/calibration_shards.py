"""Calibration shards as a worker holds them, and how far through the blocks each batch has come.

A batch keeps what entered its block until it leaves it. So it can go back within the block at any
time, and whatever is asked twice, or late, leaves it where it would be: going on begins wherever
the batch stands, and a stage that is run again, with the weights that later ones are given, has
the same bits.
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
    """A worker that was started anew is asked for a shard that it has not restored."""


@dataclass
class Batch:
    """A micro-batch on its way through the blocks.

    Attributes:
        hidden_states: [micro_batch, sequence, hidden], float32: what enters the block.
        side_inputs: the blocks' other inputs.
        mask: [micro_batch, sequence], bool: where there is text.
        block: the one that it is in.
        stage: the next one of that block.
        live: inside the block, what its next stage begins with.
    """

    hidden_states: NDArray[np.float32]
    side_inputs: list[NDArray[Any]]
    mask: NDArray[np.bool_]
    block: int = 0
    stage: int = 0
    live: tuple[Any, ...] | None = None

    def go_back(self) -> None:
        """To where it entered its block."""
        self.stage, self.live = 0, None

    def pass_through(self, program: BlockProgram, stage: int, weights: Sequence[Any]) -> Any:
        """The result of one stage; those before it are run where that is still, or again, due.

        Args:
            weights: of the whole block, quantized up to this stage.
        """
        if self.stage > stage:
            self.go_back()
        while True:
            live = (
                program.start(self.hidden_states, self.side_inputs)
                if self.live is None
                else self.live
            )
            result, self.live = program.advance(self.stage, weights, live)
            self.stage += 1
            if self.stage > stage:
                return result

    def leave(self, program: BlockProgram, weights: Sequence[Any]) -> None:
        """Go through what is left of the block, into the next one."""
        output = self.pass_through(program, len(program.groups), weights)
        self.hidden_states = np.asarray(output)
        self.block += 1
        self.go_back()


class CalibrationShards:
    """Those that a worker was given, by their number."""

    def __init__(self) -> None:
        self._held: dict[int, list[Batch]] = {}

    def put(self, index: int, batches: list[Batch]) -> None:
        self._held[index] = batches

    def stand_in(self, index: int, block: int) -> bool:
        """Whether all of a shard is in `block`."""
        held = self._held.get(index)
        return held is not None and all(batch.block == block for batch in held)

    def inside(self, index: int, block: int) -> list[Batch]:
        """A shard that is in `block`.

        Raises:
            LostShardError: it is not, or not here at all.
        """
        return list(self._between(index, block, block))

    def leaving(self, index: int, block: int) -> Iterator[Batch]:
        """Those of a shard that have not left `block` yet; the others have just done so.

        Raises:
            LostShardError: any is elsewhere.
        """
        held = self._between(index, block, block + 1)
        return (batch for batch in held if batch.block == block)

    def _between(self, index: int, first: int, last: int) -> list[Batch]:
        held = self._held.get(index)
        if held is None or not all(first <= batch.block <= last for batch in held):
            where = "nowhere" if held is None else f"in {sorted({b.block for b in held})}"
            raise LostShardError(f"shard {index} is wanted in block {first}, and is {where}")
        return held
