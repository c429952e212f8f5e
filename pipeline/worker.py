"""What one worker does. Every method is a function of its arguments and of what is in storage.

A worker keeps the activations of the shards it was given; they can be made again by `restore`
at any time, so a worker that dies costs its current block and no more. Nothing here knows of
Ray: `pipeline.cluster` makes actors of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras_hub
import numpy as np
from numpy.typing import NDArray

from pipeline import activations
from pipeline.artifact import encode_part
from pipeline.canonical import sha256
from pipeline.commits import commit_part
from pipeline.comparison import compare
from pipeline.fidelity import WindowFidelity
from pipeline.forward import Sums
from pipeline.model_state import ModelState, in_order
from pipeline.plan import LayerPlan, Plan
from pipeline.records import LayerRecord, Manifest, PartRecord, file_key
from pipeline.reduction import Subtree, reduce_subtree
from pipeline.sealing import seal
from pipeline.solving import SolvedLayer, Values, solve_layers
from pipeline.storage import open_store
from pipeline.streamed import artifact_model, source_model
from pipeline.token_windows import TokenWindows


@dataclass
class _Shard:
    """A calibration shard on its way through the blocks: one entry per micro-batch.

    Attributes:
        streams: [micro_batch, sequence, hidden], float32: what enters block `block`.
        sides: the blocks' other inputs.
        masks: [micro_batch, sequence], bool: where there is text.
    """

    block: int
    streams: list[NDArray[np.float32]]
    sides: list[list[NDArray[Any]]]
    masks: list[NDArray[np.bool_]]


class Worker:
    """Holds shards, captures, merges, solves, commits and propagates."""

    def __init__(self, plan_json: bytes, source_url: str, run_url: str) -> None:
        self._plan = Plan.from_json(plan_json)
        self._store = open_store(run_url)
        self._model = ModelState(self._plan, source_url)
        self._shards: dict[int, _Shard] = {}

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        """The source's arrays of one part, by variable path."""
        return self._model.read(part)

    def restore(self, block: int, shards: Sequence[int], start: int) -> None:
        """Bring shards to where they enter `block`.

        Args:
            start: the block before which stored activations are to be used; 0 for none.
        """
        rest = None
        for index in shards:
            tokens, mask = self._windows(index)
            rest = self._model.read(0) if rest is None else rest
            shard = self._embedded(rest, tokens, mask)
            if start:
                shard.block = start
                shard.streams = activations.load(self._store, start, index)
            self._shards[index] = shard
        for done in range(start, block):
            key = file_key(done + 1)
            kernels = self._model.kernels(done + 1, self._store.get(key))
            self._advance(done, shards, self._model.read(done + 1), kernels)

    def capture(self, block: int, subtree: Subtree, values: Values) -> list[Sums]:
        """Sums over the subtree's shards of every distinct input of the block's layers."""

        def leaf(index: int) -> list[Sums]:
            shard = self._at(index, block)
            program = self._program(block, shard)
            weights = in_order(self._model.graph.blocks[block].layer.weights, values, {})
            carry = program.empty()
            for stream, sides, mask in zip(shard.streams, shard.sides, shard.masks, strict=True):
                carry = program.capture(weights, stream, sides, mask, carry)
            sums: list[Sums] = program.finish(carry)
            return sums

        return reduce_subtree(subtree, leaf, _merge_all)

    def merge(self, left: Sums, right: Sums) -> Sums:
        """One node of the reduction."""
        return left.merge(right)  # type: ignore[arg-type]

    def solve(
        self, part: int, paths: Sequence[str], values: Values, sums: Sums | None
    ) -> list[SolvedLayer]:
        """Quantize some of a part's layers: those of one input, or those that need none."""
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        chosen: list[LayerPlan] = [layers[path] for path in paths]
        return solve_layers(self._model.targets(part), chosen, values, sums)

    def commit(
        self, part: int, previous: str, values: Values, *solved: Sequence[SolvedLayer]
    ) -> PartRecord:
        """Write a part's file and record, and return the record.

        Args:
            previous: digest of the record of the block before; "" where there is none.
            solved: the results of `solve` for all of the part's layers with a scheme.
        """
        file = self._model.parts[part]
        results = {layer.path: layer for layers in solved for layer in layers}
        arrays: dict[str, NDArray[Any]] = {}
        for path, result in results.items():
            arrays |= file.layer_values(path, result.variables)
        for stored in file.variables:
            if stored.place not in arrays:
                arrays[stored.place] = values[str(stored.variable.path)]
        data = encode_part(file, arrays)
        record = PartRecord(
            part=part,
            plan_digest=self._plan.digest,
            file=file_key(part),
            sha256=sha256(data),
            size_bytes=len(data),
            loaded_bytes=file.num_bytes,
            previous=previous,
            layers=tuple(
                LayerRecord(
                    path=layer.path,
                    scheme=layer.scheme,
                    account=results[layer.path].account if layer.path in results else None,
                    note=layer.note,
                )
                for layer in self._plan.parts[part].layers
            ),
        )
        commit_part(self._store, record, data)
        return record

    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *solved: Sequence[SolvedLayer]
    ) -> None:
        """Send shards through the quantized block."""
        targets = self._model.targets(block + 1)
        kernels = {
            str(targets[layer.path].layer._kernel.path): layer.kernel
            for layers in solved
            for layer in layers
            if layer.kernel is not None
        }
        self._advance(block, shards, values, kernels)

    def quantize_alone(self, part: int) -> PartRecord:
        """Read, solve and commit a part whose layers need no calibration."""
        values = self._model.read(part)
        paths = [layer.path for layer in self._plan.parts[part].layers if layer.scheme]
        return self.commit(part, "", values, self.solve(part, paths, values, None))

    def seal(self, records: Mapping[int, PartRecord]) -> Manifest:
        """Write the artifact's small files and the manifest; all parts must be committed."""
        return seal(self._plan, self._model, self._store, records)

    def compare(self, windows: bytes, chosen: Sequence[int]) -> list[WindowFidelity]:
        """Run source and finished artifact over some of the windows."""
        given = TokenWindows.from_bytes(windows)
        picked = list(chosen)
        return compare(
            source_model(self._model),
            artifact_model(self._model, self._store),
            given.tokens[picked],
            given.mask[picked],
            causal=isinstance(self._model.own.task, keras_hub.models.CausalLM),
        )

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, activations.Kept]:
        """Store the activations that enter `block`, to resume from."""
        return {
            index: activations.store(self._store, block, index, self._at(index, block).streams)
            for index in shards
        }

    def _advance(
        self,
        block: int,
        shards: Sequence[int],
        values: Values,
        kernels: Mapping[str, NDArray[np.float32]],
    ) -> None:
        weights = in_order(self._model.graph.blocks[block].layer.weights, values, kernels)
        for index in shards:
            shard = self._at(index, block)
            program = self._program(block, shard)
            for batch, (stream, sides) in enumerate(zip(shard.streams, shard.sides, strict=True)):
                shard.streams[batch] = np.asarray(program.run(weights, stream, sides))
            shard.block = block + 1

    def _program(self, block: int, shard: _Shard) -> Any:
        return self._model.program(
            self._model.graph.blocks[block], shard.streams[0], shard.sides[0]
        )

    def _at(self, index: int, block: int) -> _Shard:
        shard = self._shards.get(index)
        if shard is None or shard.block != block:
            raise LostShardError(index, block, None if shard is None else shard.block)
        return shard

    def _windows(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A shard's tokens and mask, padded to whole micro-batches."""
        tokens = self._plan.tokens
        assert tokens is not None
        windows = TokenWindows.from_bytes(self._store.get(tokens.key, sha256=tokens.digest))
        a, b = tokens.shards[index]
        padding = ((0, -(b - a) % tokens.micro_batch), (0, 0))
        return np.pad(windows.tokens[a:b], padding), np.pad(windows.mask[a:b], padding)

    def _embedded(self, rest: Values, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> _Shard:
        assert self._plan.tokens is not None
        size = self._plan.tokens.micro_batch
        shard = _Shard(0, [], [], [])
        for a in range(0, len(tokens), size):
            stream, sides = self._model.embed(rest, tokens[a : a + size], mask[a : a + size])
            shard.streams.append(stream)
            shard.sides.append(sides)
            shard.masks.append(mask[a : a + size])
        return shard


class LostShardError(RuntimeError):
    """A worker that was started anew is asked for a shard that it has not restored."""

    def __init__(self, index: int, block: int, held: int | None) -> None:
        super().__init__(f"shard {index} does not stand before block {block} (held: {held})")


def _merge_all(left: list[Sums], right: list[Sums]) -> list[Sums]:
    return [a.merge(b) for a, b in zip(left, right, strict=True)]  # type: ignore[arg-type]
