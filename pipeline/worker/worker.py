"""What one worker does. Every method is a function of its arguments and of what is in storage.

A worker keeps the activations of the shards it was given; they can be made again by `restore`
at any time, so a worker that dies costs its current block and no more. Nothing here knows of
Ray: `pipeline.executor.ray_executor` makes actors of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.finalize import encode_solved_part, finalize
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.fidelity import WindowFidelity
from pipeline.plan import LayerPlan, Plan
from pipeline.reduction import Subtree, reduce_subtree
from pipeline.run import activations
from pipeline.run.commits import commit_part, committed_file
from pipeline.run.records import Manifest, PartRecord
from pipeline.run.worker_api import CalibrationStatistics, SolvedLayer, SolvedSlices, Values
from pipeline.storage.object_store import open_store
from pipeline.worker import statistics as input_sums
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.calibration_shards import Batch, CalibrationShards, LostShardError
from pipeline.worker.evaluate import artifact_model, compare, source_model
from pipeline.worker.memory import FreedMemory
from pipeline.worker.model_state import ModelState, in_order
from pipeline.worker.solve import CompiledAhead, join_layer, solve_layers, solve_some


class Worker:
    """Holds shards, captures, merges, solves, commits and propagates."""

    def __init__(self, plan: Plan, source_url: str, run_url: str) -> None:
        self._plan = plan
        self._store = open_store(run_url)
        self._model = ModelState(self._plan, source_url)
        self._shards = CalibrationShards()
        self._freed = FreedMemory()
        self._compiled = CompiledAhead(plan, self._model.targets, self._model.scale_dtype)

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        """The source's arrays of one part, by variable path."""
        return self._model.read(part)

    def restore(self, block: int, shards: Sequence[int], start: int) -> None:
        """Bring shards to where they enter `block`; those that are inside it need only go back.

        Args:
            start: the block before which stored activations are to be used; 0 for none.
        """
        self._compiled.begin()
        missing = [index for index in shards if not self._shards.stand_in(index, block)]
        for index in shards:
            if index not in missing:
                for batch in self._shards.inside(index, block):
                    batch.go_back()
        rest = None
        for index in missing:
            tokens, mask = self._windows(index)
            rest = self._model.read(0) if rest is None else rest
            batches = self._embedded(rest, tokens, mask)
            if start:
                try:
                    kept = activations.load(self._store, start, index)
                except (DamagedObjectError, MissingObjectError) as error:
                    # They are a cache, and were whole a moment ago: begin from others.
                    raise LostShardError(str(error)) from error
                for batch, hidden_states in zip(batches, kept, strict=True):
                    batch.hidden_states, batch.block = hidden_states, start
            self._shards.put(index, batches)
        for done in range(start, block if missing else start):
            kernels = self._model.kernels(done + 1, committed_file(self._store, done + 1))
            self._leave(done, missing, self._on_device(done, self._model.read(done + 1), kernels))

    def capture(
        self,
        block: int,
        stage: int,
        subtree: Subtree,
        values: Values,
        *solved: Sequence[SolvedLayer],
    ) -> CalibrationStatistics:
        """Go on, or back, to the input of the block's group `stage`, and sum it over shards.

        Args:
            solved: the results of all groups before, and of layers that needed no calibration.
        """
        weights = self._weights(block, values, solved)

        def leaf(index: int) -> CalibrationStatistics:
            batches = self._shards.inside(index, block)
            program = self._program(block, batches[0])
            group = program.groups[stage]
            carry = input_sums.empty(group.statistics, group.in_features)
            for batch in batches:
                inputs = batch.pass_through(program, stage, weights)
                carry = input_sums.add(
                    carry,
                    inputs,
                    batch.mask,
                    statistics=group.statistics,
                    input_axes=group.input_axes,
                )
            return input_sums.finish(group.statistics, carry)

        return reduce_subtree(subtree, leaf, _merged)

    def merge(
        self, left: CalibrationStatistics, right: CalibrationStatistics
    ) -> CalibrationStatistics:
        """One node of the reduction."""
        return _merged(left, right)

    def solve(
        self, part: int, paths: Sequence[str], values: Values, sums: CalibrationStatistics | None
    ) -> list[SolvedLayer]:
        """Quantize some of a part's layers: those of one input, or those that need none."""
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        chosen: list[LayerPlan] = [layers[path] for path in paths]
        self._compiled.await_for(chosen)
        return solve_layers(self._model.targets(part), chosen, values, sums)

    def solve_slices(
        self,
        part: int,
        slices: Mapping[str, Sequence[int]],
        values: Values,
        sums: CalibrationStatistics,
    ) -> dict[str, SolvedSlices]:
        """Quantize some row slices of some of a part's layers of one input, by path."""
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        targets = self._model.targets(part)
        self._compiled.await_for([layers[path] for path in slices])
        return {
            path: solve_some(targets[path], layers[path], values, sums, numbers)
            for path, numbers in slices.items()
        }

    def join(
        self, part: int, paths: Sequence[str], values: Values, *solved: Mapping[str, SolvedSlices]
    ) -> list[SolvedLayer]:
        """Put layers together whose slices several workers solved."""
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        targets = self._model.targets(part)
        return [
            join_layer(
                targets[path], layers[path], values, [one[path] for one in solved if path in one]
            )
            for path in paths
        ]

    def commit(
        self, part: int, previous: str, values: Values, *solved: Sequence[SolvedLayer]
    ) -> PartRecord:
        """Write a part's file and record, and return the record.

        Args:
            previous: digest of the record of the block before; "" where there is none.
            solved: the results of `solve` for all of the part's layers with a scheme.
        """
        results = {layer.path: layer for layers in solved for layer in layers}
        record, data = encode_solved_part(
            self._plan, self._model.parts[part], previous, values, results
        )
        commit_part(self._store, record, data)
        return record

    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *solved: Sequence[SolvedLayer]
    ) -> None:
        """Send shards through what is left of the block; nothing for those that have left it."""
        self._leave(block, shards, self._weights(block, values, solved))

    def quantize_alone(self, part: int) -> PartRecord:
        """Read, solve and commit a part whose layers need no calibration."""
        self._compiled.begin()
        values = self._model.read(part)
        paths = [layer.path for layer in self._plan.parts[part].layers if layer.scheme]
        return self.commit(part, "", values, self.solve(part, paths, values, None))

    def finalize(self, records: Mapping[int, PartRecord]) -> Manifest:
        """Write the artifact's small files and the manifest; all parts must be committed."""
        return finalize(
            self._plan, self._store, self._model.preset_files(), self._model.parts, records
        )

    def evaluate(self, windows: bytes, chosen: Sequence[int]) -> list[WindowFidelity]:
        """Run source and finished artifact over some of the windows."""
        given = TokenWindows.from_bytes(windows)
        picked = list(chosen)
        return compare(
            source_model(self._model),
            artifact_model(self._model, self._store),
            given.tokens[picked],
            given.mask[picked],
            causal=self._model.own.predicts_tokens,
        )

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, activations.SavedShard]:
        """Store the activations that enter `block`, to resume from."""
        return {
            index: activations.save(
                self._store,
                block,
                index,
                [b.hidden_states for b in self._shards.inside(index, block)],
            )
            for index in shards
        }

    def _weights(
        self, block: int, values: Values, solved: Sequence[Sequence[SolvedLayer]]
    ) -> list[Any]:
        """The block's weights, quantized as far as they are, on the device."""
        targets = self._model.targets(block + 1)
        kernels = {
            targets[layer.path].kernel_path: layer.kernel
            for layers in solved
            for layer in layers
            if layer.kernel is not None
        }
        return self._on_device(block, values, kernels)

    def _on_device(
        self, block: int, values: Values, kernels: Mapping[str, NDArray[np.float32]]
    ) -> list[Any]:
        variables = self._model.graph.blocks[block].layer.weights
        return [jnp.asarray(value) for value in in_order(variables, values, kernels)]

    def _leave(self, block: int, shards: Sequence[int], weights: Sequence[Any]) -> None:
        for index in shards:
            for batch in self._shards.leaving(index, block):
                batch.leave(self._program(block, batch), weights)
        self._freed.limit()

    def _program(self, block: int, batch: Batch) -> BlockProgram:
        return self._model.program(
            self._model.graph.blocks[block], batch.hidden_states, batch.side_inputs
        )

    def _windows(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A shard's tokens and mask, padded to whole micro-batches."""
        tokens = self._plan.tokens
        assert tokens is not None
        windows = TokenWindows.from_bytes(self._store.get(tokens.key, sha256=tokens.digest))
        a, b = tokens.shards[index]
        padding = ((0, -(b - a) % tokens.micro_batch), (0, 0))
        return np.pad(windows.tokens[a:b], padding), np.pad(windows.mask[a:b], padding)

    def _embedded(
        self, rest: Values, tokens: NDArray[np.int32], mask: NDArray[np.bool_]
    ) -> list[Batch]:
        assert self._plan.tokens is not None
        size = self._plan.tokens.micro_batch
        batches = []
        for a in range(0, len(tokens), size):
            hidden_states, side_inputs = self._model.embed(
                rest, tokens[a : a + size], mask[a : a + size]
            )
            batches.append(
                Batch(hidden_states=hidden_states, side_inputs=side_inputs, mask=mask[a : a + size])
            )
        return batches


def _merged(left: CalibrationStatistics, right: CalibrationStatistics) -> CalibrationStatistics:
    return left.merge(right)  # type: ignore[arg-type]
