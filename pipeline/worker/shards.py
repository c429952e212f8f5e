"""The calibration shards that a worker holds: windows on their way through the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax import Array

from pipeline.executor.protocol import WorkerLostError
from pipeline.model.blocks import Call
from pipeline.model.inputs import InputBatch
from pipeline.worker.activation_memory import ActivationMemory
from pipeline.worker.block_program import BlockProgram


class LostShardError(WorkerLostError):
    """A restarted worker was asked for a shard that it has not restored."""


@dataclass
class MicroBatch:
    """Windows that pass the blocks together.

    What entered a block is kept until the windows have passed it, so that they can go back within
    it at any time. A call that is repeated, or comes late, therefore does no harm: a stage that
    runs again, with the weights that later stages are given, has the same bits. So does a stage
    that leaves too much to be kept, and runs for each use.

    Attributes:
        values: what the block or any later one uses, by number (see `pipeline.model.blocks`).
        memory: where it and `live` are.
        batch: what the windows are made of.
        in_float: the same windows on their way through the float model, where the plan has that
            (`Plan.has_float_stream`). Within a block they go wherever they are asked to; they leave
            it first.
        held_back: what was made of other windows is judged on these (`TokensPlan.is_held_back`).
        block, stage: the block that it is in, and the next stage of that block.
        live: what that stage begins with.
    """

    values: dict[int, Array]
    batch: InputBatch
    memory: ActivationMemory
    in_float: MicroBatch | None = None
    held_back: bool = False
    block: int = 0
    stage: int = 0
    live: tuple[Any, ...] = ()

    @property
    def streams(self) -> tuple[MicroBatch, ...]:
        """Its windows in every model that they pass: the float one, if any, and the quantized."""
        return (self,) if self.in_float is None else (self.in_float, self)

    def rewind(self) -> None:
        """Go back to where it entered its block."""
        self.stage, self.live = 0, ()

    def taken(self, call: Call) -> tuple[Array, ...]:
        """What a call takes of the values."""
        return tuple(self.values[number] for number in call.takes)

    def run_stage(
        self, call: Call, program: BlockProgram, stage: int, weights: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Run the block up to this stage, and return the stage's results.

        Args:
            weights: of the whole block, quantized up to this stage.
        """
        if self.stage > stage:
            self.rewind()
        if self.stage == 0:
            self.live = self.taken(call)
        fetched = here = self.memory.fetch(self.live)
        for number in range(self.stage, stage + 1):
            results, here = program.run_stage(number, weights, here)
            if program.leaves_little(number):
                kept = dict(zip(map(id, fetched), self.live, strict=True))
                self.stage, self.live = number + 1, self.memory.keep(here, kept)
                fetched = here
        return results

    def finish_block(
        self, call: Call, program: BlockProgram, weights: Sequence[Any]
    ) -> dict[int, Array]:
        """Run the rest of the block; returns the values beside those that it has given."""
        given = self.run_stage(call, program, len(program.groups), weights)
        return self.values | dict(zip(call.gives, self.memory.keep(given), strict=True))

    def enter(self, block: int, values: dict[int, Array]) -> None:
        """Enter a block with these values."""
        self.values, self.block = values, block
        self.rewind()


class CalibrationShards:
    """The shards that a worker holds, by index."""

    def __init__(self) -> None:
        self._held: dict[int, list[MicroBatch]] = {}

    def put(self, index: int, batches: list[MicroBatch]) -> None:
        self._held[index] = batches

    def keep_only(self, indices: Sequence[int]) -> None:
        """Give back the memory of all others, which are with other workers now."""
        self._held = {index: one for index, one in self._held.items() if index in indices}

    def clear(self) -> None:
        """Give their memory back, once the last block is solved."""
        self._held.clear()

    def has(self, index: int, block: int) -> bool:
        """Whether all of a shard is in `block`, in every model that it passes."""
        held = self._held.get(index, [])
        return bool(held) and all(x.block == block for batch in held for x in batch.streams)

    def device_of(self, index: int) -> int:
        """The number of the device that a held shard is on."""
        return self._held[index][0].memory.device

    def get(self, index: int, block: int) -> list[MicroBatch]:
        """A shard, all of which is in `block`.

        Raises:
            LostShardError: it is elsewhere, or not held at all.
        """
        return list(self._between(index, block, block))

    def check(self, indices: Iterable[int], block: int) -> None:
        """Check that all of some shards are held, and in `block`; raises as `get`."""
        for index in indices:
            self.get(index, block)

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
        blocks = sorted({one.block for batch in held for one in batch.streams})
        if not first <= blocks[0] <= blocks[-1] <= last:
            raise LostShardError(f"shard {index} is needed in block {first}, but is in {blocks}")
        return held
