"""The way of calibration windows through the model: into a block, through it, and to storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.executor.protocol import ActivationPlace
from pipeline.reduction import split
from pipeline.run import activations
from pipeline.run.worker_api import Values
from pipeline.storage.object_store import ObjectStore
from pipeline.worker.activation_memory import ActivationMemory
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.block_weights import BlockWeights, Stored
from pipeline.worker.devices import Devices
from pipeline.worker.memory import FreedMemory
from pipeline.worker.model_state import ModelState, place_weights
from pipeline.worker.shards import CalibrationShards, LostShardError, MicroBatch


class Passage:
    """Takes the shards of a worker through the model, in float too where the plan has that."""

    def __init__(
        self,
        model: ModelState,
        store: ObjectStore,
        shards: CalibrationShards,
        weights: BlockWeights,
        devices: Devices,
    ) -> None:
        self._plan, self._model, self._store = model.plan, model, store
        self._shards, self._weights, self._devices = shards, weights, devices
        self._glue_values: Values = {}
        self._freed = FreedMemory()

    def begin(
        self, missing: Sequence[int], block: int, place: ActivationPlace, rest: Values
    ) -> None:
        """Bring shards to where they enter a block: 0, or one whose activations are saved.

        Args:
            rest: the source's arrays of part 0.

        Raises:
            LostShardError: what was saved is damaged.
        """
        self._glue_values = {path: rest[path] for path in sorted(self._model.glue_paths)}
        planned = self._plan.tokens
        assert planned is not None
        windows = TokenWindows.from_bytes(self._store.get(planned.key, sha256=planned.digest))
        shares = split(len(missing), len(self._devices))

        def enter(device: int) -> None:
            memory = ActivationMemory(place, self._devices, device)
            embed = place_weights(self._model.graph.embed.weights, rest)
            for index in (missing[i] for subtree in shares[device] for i in subtree):
                self._shards.put(index, self._enter(embed, windows, index, block, memory))

        self._devices.each(enter)

    def finish_block(
        self,
        block: int,
        shards: Sequence[int],
        values: Values,
        solved: Mapping[str, Stored],
        floats: Values,
    ) -> None:
        """Send shards through the rest of a block, all of whose layers with a scheme are solved.

        Args:
            floats: what the quantized block has in place of some of the source's values.
        """
        unfinished = [x for index in shards for x in self._shards.unfinished(index, block)]
        if not unfinished:
            return
        call = self._model.call(block)
        weights = self._weights.on_each(block, values, solved, floats)
        in_float = weights
        if self._plan.has_float_stream:
            in_float = self._weights.on_each(block, values, {})

        def finish(device: int) -> None:
            glue = self._model.glue_weights(block + 1, self._glue_values)
            for batch in (one for one in unfinished if one.memory.device == device):
                # In float first: windows have left the block once they have in the quantized model.
                for one in (one for one in batch.streams if one.block == block):
                    here = (weights if one is batch else in_float)[device]
                    found = one.finish_block(call, self.program(block, one), here)
                    entered = self._model.enter(block + 1, glue, found, one.memory)
                    one.enter(block + 1, entered)

        self._devices.each(finish)
        self._weights.free()
        self._freed.limit()

    def save(self, block: int, shards: Sequence[int]) -> dict[int, activations.SavedShard]:
        """Store the activations that enter a block."""
        self._shards.check(shards, block)
        carried = self._model.graph.carried(self._model.call(block))

        def save(device: int) -> dict[int, activations.SavedShard]:
            saved = {}
            for index in (one for one in shards if self._shards.device_of(one) == device):
                values = [
                    [np.asarray(one.values[number]) for one in batch.streams for number in carried]
                    for batch in self._shards.get(index, block)
                ]
                saved[index] = activations.save(self._store, block, index, values)
            return saved

        return {index: one for saved in self._devices.each(save) for index, one in saved.items()}

    def program(self, block: int, batch: MicroBatch) -> BlockProgram:
        """The block's compiled program for such micro-batches."""
        return self._model.program(
            self._model.graph.blocks[block], batch.taken(self._model.call(block))
        )

    def _enter(
        self,
        embed: Sequence[Array],
        windows: TokenWindows,
        shard: int,
        block: int,
        memory: ActivationMemory,
    ) -> list[MicroBatch]:
        """A shard's micro-batches where they enter a block: 0, or one whose activations are saved.

        Args:
            embed: the weights of what comes before the blocks, on the device.
        """
        plan = self._plan.tokens
        assert plan is not None
        start, stop = plan.shards[shard]
        batches = []
        for a in range(start, stop, plan.micro_batch):
            # The last micro-batch is filled up with masked windows.
            chosen = slice(a, min(a + plan.micro_batch, stop))
            batch = self._model.layout.batch(windows, chosen, plan.micro_batch)
            found = self._model.embed(embed, batch)
            values = dict(zip(found, memory.keep(list(found.values())), strict=True))
            in_float = None
            if self._plan.has_float_stream:
                in_float = MicroBatch(values=values, batch=batch, memory=memory)
            batches.append(
                MicroBatch(
                    values=values,
                    batch=batch,
                    memory=memory,
                    in_float=in_float,
                    held_back=plan.is_held_back(a),
                )
            )
        if block:
            try:
                saved = activations.load(self._store, block, shard)
            except (DamagedObjectError, MissingObjectError) as error:
                # They were complete when the driver chose them: have it choose again.
                raise LostShardError(str(error)) from error
            call = self._model.call(block)
            carried = self._model.graph.carried(call)
            for held, arrays in zip(batches, saved, strict=True):
                kept = iter(memory.keep([jnp.asarray(array) for array in arrays]))
                for one in held.streams:
                    values = one.values | {number: next(kept) for number in carried}
                    one.enter(block, {number: values[number] for number in call.live})
        return batches
