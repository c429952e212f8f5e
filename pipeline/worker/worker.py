"""One worker: it holds calibration shards, and captures, merges, solves, commits and propagates.

`restore` can make its activations again at any time, so that a worker that dies costs its current
block and no more. Ray turns workers into actors in `pipeline.executor.ray_executor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.parts import encode_solved_part, finalize
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity
from pipeline.machine import check_machine
from pipeline.plan import LayerPlan, Plan
from pipeline.reduction import reduce_subtree
from pipeline.run import activations
from pipeline.run.commits import commit_part, committed_file
from pipeline.run.records import Manifest, PartRecord
from pipeline.run.worker_api import SolvedLayer, SolvedSlices, Values, WorkerApi
from pipeline.storage.object_store import open_store
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.device_memory import device_errors
from pipeline.worker.evaluate import evaluate
from pipeline.worker.memory import FreedMemory
from pipeline.worker.model_state import ModelState, in_order
from pipeline.worker.shards import CalibrationShards, LostShardError, MicroBatch
from pipeline.worker.solve import CompiledAhead, join_layer, solve_layers, solve_slices
from pipeline.worker.statistics import sum_inputs, sum_routed
from pipeline.worker.streamed_model import artifact_model, source_model
from quantizer.experts import ExpertHessians, InputStatistics


class Worker(WorkerApi):
    """See `WorkerApi` for what each method does."""

    def __init__(self, plan: Plan, source_url: str, run_url: str) -> None:
        self._plan = plan
        self._store = open_store(run_url)
        self._model = ModelState(self._plan, source_url)
        self._shards = CalibrationShards()
        self._glue_values: Values = {}
        self._freed = FreedMemory()
        self._compiled = CompiledAhead(plan, self._model.targets, self._model.scale_dtype)

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        return self._model.read(part)

    @device_errors()
    def restore(self, block: int, shards: Sequence[int], start: int) -> None:
        self._begin()
        missing = [index for index in shards if not self._shards.has(index, block)]
        for index in set(shards) - set(missing):
            for batch in self._shards.get(index, block):
                batch.rewind()
        if not missing:
            return
        rest = self._model.read(0)
        self._glue_values = {path: rest[path] for path in sorted(self._model.glue_paths)}
        planned = self._plan.tokens
        assert planned is not None
        windows = TokenWindows.from_bytes(self._store.get(planned.key, sha256=planned.digest))
        for index in missing:
            self._shards.put(index, self._enter(rest, windows, index, start))
        for done in range(start, block):
            kernels = self._model.dequantized_kernels(
                done + 1, committed_file(self._store, done + 1)
            )
            weights = self._on_device(done, self._model.read(done + 1), kernels)
            self._finish_block(done, missing, weights)

    @device_errors()
    def capture(
        self,
        block: int,
        stage: int,
        subtree: range,
        values: Values,
        *solved: Sequence[SolvedLayer],
        experts: range | None = None,
    ) -> InputStatistics:
        weights = self._weights(block, values, solved)

        def leaf(index: int) -> InputStatistics:
            batches = self._shards.get(index, block)
            call, program = self._model.call(block), self._program(block, batches[0])
            group, shapes = program.groups[stage], program.group_shapes[stage]
            found = ((one.run_stage(call, program, stage, weights), one.batch) for one in batches)
            if group.experts:
                assert experts is not None
                [shape] = shapes
                routed = ((*results, batch.rows(shape)) for results, batch in found)
                return sum_routed(routed, group.in_features, experts)
            inputs = (
                (result, batch.rows(shape))
                for results, batch in found
                for result, shape in zip(results, shapes, strict=True)
            )
            return sum_inputs(inputs, group, program.input_axes[stage])

        return reduce_subtree(subtree, leaf, self.merge)

    @device_errors()
    def merge(self, left: InputStatistics, right: InputStatistics) -> InputStatistics:
        return left.merge(right)  # type: ignore[arg-type]

    @device_errors()
    def solve(
        self,
        part: int,
        paths: Sequence[str],
        values: Values,
        statistics: InputStatistics | None,
    ) -> list[SolvedLayer]:
        assert not isinstance(statistics, ExpertHessians), "experts are solved in ranges"
        layers = self._layers(part, paths)
        self._compiled.await_for(layers)
        names = {layer.name for layer in layers}
        folds = [g.fold for g in self._plan.parts[part].groups if names.intersection(g.targets)]
        fold = folds[0] if folds else None  # layers solved at once share an input, or have none
        return solve_layers(self._model.targets(part), layers, values, statistics, fold)

    @device_errors()
    def solve_slices(
        self,
        part: int,
        slices: Mapping[str, Sequence[int]],
        values: Values,
        statistics: InputStatistics,
    ) -> dict[str, SolvedSlices]:
        layers = self._layers(part, slices)
        targets = self._model.targets(part)
        self._compiled.await_for(layers)
        return {
            x.path: solve_slices(targets[x.path], x, values, statistics, slices[x.path])
            for x in layers
        }

    @device_errors()
    def join(
        self, part: int, paths: Sequence[str], values: Values, *solved: Mapping[str, SolvedSlices]
    ) -> list[SolvedLayer]:
        targets = self._model.targets(part)
        joined = []
        for layer in self._layers(part, paths):
            slices = [one[layer.path] for one in solved if layer.path in one]
            joined.append(join_layer(targets[layer.path], layer, values, slices))
        return joined

    def commit(
        self, part: int, previous: str, values: Values, *solved: Sequence[SolvedLayer]
    ) -> PartRecord:
        results = {layer.path: layer for layers in solved for layer in layers}
        record, files = encode_solved_part(
            self._plan, self._model.parts[part], previous, values, results
        )
        commit_part(self._store, record, files)
        return record

    @device_errors()
    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *solved: Sequence[SolvedLayer]
    ) -> None:
        self._finish_block(block, shards, self._weights(block, values, solved))

    @device_errors()
    def quantize_alone(self, part: int) -> PartRecord:
        self._begin()
        values = self._model.read(part)
        paths = [layer.path for layer in self._plan.parts[part].layers if layer.scheme]
        return self.commit(part, "", values, self.solve(part, paths, values, None))

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, activations.SavedShard]:
        saved = {}
        for index in shards:
            carried = self._model.graph.carried(self._model.call(block))
            batches = self._shards.get(index, block)
            values = [[batch.values[number] for number in carried] for batch in batches]
            saved[index] = activations.save(self._store, block, index, values)
        return saved

    def finalize(self, records: Mapping[int, PartRecord]) -> Manifest:
        return finalize(
            self._plan, self._store, self._model.preset_files(), self._model.parts, records
        )

    @device_errors()
    def evaluate(
        self, given: EvaluationSet, numbers: Sequence[int]
    ) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
        source, artifact = source_model(self._model), artifact_model(self._model, self._store)
        return evaluate(
            source,
            artifact,
            self._model.layout,
            given,
            numbers,
            predicts_tokens=self._model.skeleton.predicts_tokens,
        )

    def _begin(self) -> None:
        """Before anything is computed that the run stores; evaluation may be done anywhere."""
        check_machine(self._plan.machine)
        self._compiled.begin()

    def _layers(self, part: int, paths: Iterable[str]) -> list[LayerPlan]:
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        return [layers[path] for path in paths]

    def _weights(
        self, block: int, values: Values, solved: Sequence[Sequence[SolvedLayer]]
    ) -> list[Any]:
        """The block's weights on the device, with the kernels of the layers solved so far."""
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

    def _finish_block(self, block: int, shards: Sequence[int], weights: Sequence[Any]) -> None:
        call = self._model.call(block)
        for index in shards:
            for batch in self._shards.unfinished(index, block):
                values = batch.finish_block(call, self._program(block, batch), weights)
                batch.enter(block + 1, self._model.enter(block + 1, self._glue_values, values))
        self._freed.limit()

    def _program(self, block: int, batch: MicroBatch) -> BlockProgram:
        return self._model.program(
            self._model.graph.blocks[block], batch.taken(self._model.call(block))
        )

    def _enter(
        self, rest: Values, windows: TokenWindows, shard: int, block: int
    ) -> list[MicroBatch]:
        """A shard's micro-batches where they enter a block: 0, or one whose activations are saved.

        Args:
            rest: the source's arrays outside the blocks.
        """
        plan = self._plan.tokens
        assert plan is not None
        start, stop = plan.shards[shard]
        batches = []
        for a in range(start, stop, plan.micro_batch):
            # The last micro-batch is filled up with masked windows.
            chosen = slice(a, min(a + plan.micro_batch, stop))
            batch = self._model.layout.batch(windows, chosen, plan.micro_batch)
            batches.append(MicroBatch(values=self._model.embed(rest, batch), batch=batch))
        if block:
            try:
                saved = activations.load(self._store, block, shard)
            except (DamagedObjectError, MissingObjectError) as error:
                # They were complete when the driver chose them: have it choose again.
                raise LostShardError(str(error)) from error
            call = self._model.call(block)
            carried = self._model.graph.carried(call)
            for one, arrays in zip(batches, saved, strict=True):
                values = one.values | dict(zip(carried, arrays, strict=True))
                one.enter(block, {number: values[number] for number in call.live})
        return batches
