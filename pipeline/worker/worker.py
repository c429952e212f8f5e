"""One worker: it holds calibration shards, and captures, merges, solves, commits and propagates.

`restore` can make its activations again at any time, so that a worker that dies costs its current
block and no more. Ray turns workers into actors in `pipeline.executor.ray_executor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax import Array
from numpy.typing import NDArray

from pipeline.artifact.parts import encode_solved_part, finalize
from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.executor.protocol import ActivationPlace
from pipeline.fidelity import WindowFidelity
from pipeline.float_statistics import statistics_plan, statistics_store
from pipeline.machine import check_machine
from pipeline.plan import LayerPlan, Plan
from pipeline.run import activations
from pipeline.run.commits import commit_part, committed_file
from pipeline.run.records import CommittedRecord, Manifest
from pipeline.run.solved_layers import (
    SolvedLayer,
    SolvedLayers,
    SolvedSlices,
    TunedBlock,
    whole_block,
)
from pipeline.run.worker_api import (
    CommittedPart,
    HeldSum,
    InputSum,
    LayersAlone,
    PartsOfRuns,
    RunAt,
    TuningWindows,
    Values,
    WorkerApi,
)
from pipeline.storage.object_store import open_store
from pipeline.worker.block_weights import BlockWeights, Stored
from pipeline.worker.captured_inputs import captured, captured_of_experts
from pipeline.worker.code_histograms import code_histograms
from pipeline.worker.device_memory import device_errors
from pipeline.worker.devices import Devices
from pipeline.worker.held_sums import HeldSums
from pipeline.worker.judging import Judging
from pipeline.worker.model_state import ModelState
from pipeline.worker.passage import Passage
from pipeline.worker.shards import CalibrationShards
from pipeline.worker.solve import CompiledAhead, join_layer, solve_layers, solve_slices
from pipeline.worker.solve_stored import solve_block
from pipeline.worker.statistics import (
    finished,
    in_numpy,
    joined,
    judged_drift,
    made,
    merged,
    of_experts,
    sum_inputs,
    sum_routed,
)
from pipeline.worker.stored_sums import BlockSums, encode_sums, finalize_statistics
from pipeline.worker.tune import batch_numbers, schedule_of, tuning_batch
from quantizer.experts import ExpertHessians


class Worker(WorkerApi):
    """See `WorkerApi` for what each method does."""

    def __init__(
        self, plan: Plan, source_url: str, run_url: str, devices: Devices | None = None
    ) -> None:
        """Args: devices: None for those of this process."""
        self._plan = plan
        self._devices = Devices.of_this_process() if devices is None else devices
        self._store = open_store(run_url)
        self._model = ModelState(self._plan, source_url)
        self._weights = BlockWeights(self._model, self._devices)
        self._shards = CalibrationShards()
        self._sums = HeldSums()
        self._passage = Passage(
            self._model, self._store, self._shards, self._weights, self._devices
        )
        self._compiled = CompiledAhead(plan, self._model.targets, self._model.scale_dtype)
        self._judging = Judging(
            self._model, self._store, self._devices, lambda plan: ModelState(plan, source_url)
        )

    def read(self, part: int) -> dict[str, NDArray[Any]]:
        # A GPU comes with its share of a host.
        return self._model.read(part, threads=len(self._devices))

    @device_errors()
    def restore(
        self, block: int, shards: Sequence[int], start: int, place: ActivationPlace = "device"
    ) -> None:
        self._begin()
        self._shards.keep_only(shards)
        missing = [index for index in shards if not self._shards.has(index, block)]
        for index in set(shards) - set(missing):
            for batch in self._shards.get(index, block):
                for one in batch.streams:
                    one.rewind()
        if not missing:
            return
        self._sums.clear()
        self._passage.begin(missing, start, place, self.read(0))
        for done in range(start, block):
            values = self._model.read(done + 1)
            if self._captures:
                self._passage.finish_block(done, missing, values, {}, {})
                continue
            solved, floats = self._model.committed(done + 1, committed_file(self._store, done + 1))
            changed = {} if self._plan.recipe.tuning is None else floats
            self._passage.finish_block(done, missing, values, solved, changed)

    @device_errors()
    def capture(
        self,
        block: int,
        stage: int,
        subtree: range,
        values: Values,
        *before: Sequence[SolvedLayer] | HeldSum,
        experts: range | None = None,
    ) -> HeldSum:
        solved = [one for one in before if not isinstance(one, HeldSum)]
        name = HeldSum(block=block, stage=stage, leaves=subtree, experts=experts)
        if self._captures:
            self._sums.begin_block(block)
        else:
            self._sums.begin(name)
        weights = self._weights.on_each(block, values, _stored(x for one in solved for x in one))
        part = self._plan.parts[block + 1]
        corrected = part.corrects_drift(part.groups[stage])
        in_float = self._weights.on_each(block, values, {}) if corrected else []
        if experts is not None:
            self._check_routing(block, subtree[0], weights)

        def leaf(index: int) -> InputSum:
            batches = self._shards.get(index, block)
            call, program = self._model.call(block), self._passage.program(block, batches[0])
            here = weights[self._shards.device_of(index)]
            group = program.groups[stage]
            if experts is not None:
                routed = captured_of_experts(batches, call, program, stage, here)
                return sum_routed(routed, group.in_features, experts)
            exact = in_float[self._shards.device_of(index)] if corrected else None
            inputs = captured(batches, call, program, stage, here, exact)
            return sum_inputs(inputs, group, program.input_axes[stage])

        self._shards.check(subtree, block)
        total = self._devices.reduce(subtree, self._shards.device_of, leaf, merged)
        # What fails, or takes long, shows here, and not where the sum is used.
        return self._sums.put(name, made(total))

    @device_errors()
    def merge(self, left: HeldSum, right: HeldSum, sent: InputSum | None = None) -> HeldSum:
        return self._sums.merge(left, right, sent)

    @device_errors()
    def send(self, held: HeldSum, experts: range | None = None) -> InputSum:
        total = self._sums.get(held)
        return in_numpy(total if experts is None else of_experts(total, experts))

    @device_errors()
    def solve(
        self,
        part: int,
        paths: Sequence[str],
        values: Values,
        total: HeldSum | InputSum | None,
    ) -> list[SolvedLayer]:
        layers = self._layers(part, paths)
        self._compiled.await_for(layers)
        names = {layer.name for layer in layers}
        folds = [g.fold for g in self._plan.parts[part].groups if names.intersection(g.targets)]
        fold = folds[0] if folds else None  # layers solved at once share an input, or have none
        found = None if total is None else self._total(total)
        statistics = None if found is None else finished(found)
        drift = None if found is None else judged_drift(found)
        assert not isinstance(statistics, ExpertHessians), "experts are solved in ranges"
        targets, devices = self._model.targets(part), self._devices.several
        return solve_layers(targets, layers, values, statistics, fold, drift, devices=devices)

    @device_errors()
    def solve_slices(
        self,
        part: int,
        slices: Mapping[str, Sequence[int]],
        values: Values,
        *sums: HeldSum | InputSum,
        experts: range | None = None,
    ) -> dict[str, SolvedSlices]:
        layers = self._layers(part, slices)
        targets, devices = self._model.targets(part), self._devices.several
        self._compiled.await_for(layers)
        total = self._total(*sums, experts=experts)
        statistics, drift = finished(total), judged_drift(total)
        return {
            x.path: solve_slices(
                targets[x.path], x, values, statistics, slices[x.path], drift, devices=devices
            )
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

    @device_errors()
    def windows(self, block: int, shards: Sequence[int], values: Values) -> TuningWindows:
        used, numbers = schedule_of(self._plan, block).used, batch_numbers(self._plan)
        call, in_float = self._model.call(block), self._weights.on_each(block, values, {})
        return TuningWindows(
            batches={
                number: tuning_batch(
                    batch, call, self._passage.program(block, batch), in_float[batch.memory.device]
                )
                for index in shards
                for number, batch in zip(
                    numbers[index], self._shards.get(index, block), strict=True
                )
                if number in used
            }
        )

    @device_errors()
    def tune(
        self,
        block: int,
        shards: Sequence[int],
        values: Values,
        *given: Sequence[SolvedLayer] | TuningWindows,
    ) -> TunedBlock:
        batches = dict(self.windows(block, shards, values).batches)
        layers: list[SolvedLayer] = []
        for one in given:
            if isinstance(one, TuningWindows):
                batches |= one.batches
            else:
                layers += one
        weights = self._weights.of(block, values, _stored(layers))
        return self._model.tuner.tune(
            self._model.graph.blocks[block], values, weights, layers, batches
        )

    def commit(
        self, part: int, previous: str, values: Values, *solved: SolvedLayers
    ) -> CommittedPart:
        block = whole_block(solved)
        record, files = encode_solved_part(
            self._plan,
            self._model.parts[part],
            previous,
            {**values, **block.floats},
            {layer.path: layer for layer in block.layers},
            block.record,
        )
        commit_part(self._store, record, files)
        histograms = code_histograms(self._plan.parts[part].layers, block.layers)
        return CommittedPart(record=record, histograms=histograms)

    def commit_sums(self, part: int, *sums: InputSum) -> CommittedPart:
        groups = self._plan.parts[part].groups
        record, files = encode_sums(self._plan.digest, part, groups, sums)
        commit_part(self._store, record, files)
        return CommittedPart(record=record)

    def settle(self) -> None:
        """Do nothing: that this is called means that a commit which had begun has ended.

        One that still waited for its arguments may follow; it writes what a repetition writes.
        """

    @device_errors()
    def propagate(
        self, block: int, shards: Sequence[int], values: Values, *before: SolvedLayers | HeldSum
    ) -> None:
        done = whole_block(one for one in before if not isinstance(one, HeldSum))
        if done.is_changed:
            # Windows are inside the block, and weights on the device, as they were solved.
            self._weights.free()
            for batch in (x for index in shards for x in self._shards.unfinished(index, block)):
                batch.rewind()
        self._passage.finish_block(block, shards, values, _stored(done.layers), done.floats)

    @device_errors()
    def quantize_alone(self, part: int) -> CommittedPart:
        self._begin()
        sums = self._stored_sums(part)  # if they are damaged, nothing else need be done
        values = self.read(part)
        planned = self._plan.parts[part]
        self._compiled.await_for([x for x in planned.layers if x.scheme is not None])
        targets, devices = self._model.targets(part), self._devices.several
        return self.commit(
            part, "", values, solve_block(targets, planned, values, sums, devices=devices)
        )

    def _stored_sums(self, part: int) -> BlockSums | None:
        """The sums that a part is solved on; None if none of its layers is calibrated."""
        if not self._plan.parts[part].groups:
            return None
        store = statistics_store(self._plan, self._store.root_url)
        return BlockSums.read(store, statistics_plan(self._plan).digest, part)

    def keep(self, block: int, shards: Sequence[int]) -> dict[int, activations.SavedShard]:
        return self._passage.save(block, shards)

    def finalize(self, records: Mapping[int, CommittedRecord]) -> Manifest:
        if self._captures:
            return finalize_statistics(self._plan, self._store, records)
        return finalize(
            self._plan, self._store, self._model.preset_files(), self._model.parts, records
        )

    @device_errors()
    def evaluate(
        self,
        given: EvaluationSet,
        numbers: Sequence[int],
        tokens_per_pass: int = TOKENS_PER_PASS,
        of: PartsOfRuns | None = None,
    ) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
        self._begin_judging()
        return self._judging.evaluate(given, numbers, tokens_per_pass, of)

    @device_errors()
    def sensitivities(
        self,
        block: int,
        runs: Sequence[RunAt],
        given: EvaluationSet,
        tokens_per_pass: int = TOKENS_PER_PASS,
    ) -> list[list[WindowFidelity]]:
        if not self._judging.holds(runs, given):
            self._begin_judging()
        return self._judging.sensitivities(block, runs, given, tokens_per_pass)

    @device_errors()
    def layer_errors(
        self,
        block: int,
        runs: Sequence[RunAt],
        given: EvaluationSet,
        tokens_per_pass: int = TOKENS_PER_PASS,
    ) -> list[tuple[LayersAlone, ...]]:
        if not self._judging.holds(runs, given):
            self._begin_judging()
        return self._judging.layer_errors(block, runs, given, tokens_per_pass)

    def _begin_judging(self) -> None:
        """Make room."""
        self._sums.clear()
        self._shards.clear()
        self._weights.free()
        self._judging.clear()

    @property
    def _captures(self) -> bool:
        return self._plan.makes == "statistics"

    def _begin(self) -> None:
        """Before anything is computed that the run stores; evaluation may be done anywhere."""
        check_machine(self._plan.machine)
        self._compiled.begin()

    def _total(self, *sums: HeldSum | InputSum, experts: range | None = None) -> InputSum:
        """A sum, or the sum over subtrees: of these experts alone."""
        found = (self._sums.get(one) if isinstance(one, HeldSum) else one for one in sums)
        return joined(found, experts, self._devices.first)

    def _layers(self, part: int, paths: Iterable[str]) -> list[LayerPlan]:
        layers = {layer.path: layer for layer in self._plan.parts[part].layers}
        return [layers[path] for path in paths]

    def _check_routing(self, block: int, shard: int, weights: Sequence[Sequence[Array]]) -> None:
        batch = self._shards.get(shard, block)[0]
        taken = batch.taken(self._model.call(block))
        self._passage.program(block, batch).check_routing(weights[batch.memory.device], taken)


def _stored(solved: Iterable[SolvedLayer]) -> dict[str, Stored]:
    """What is stored for each solved layer, by path."""
    return {layer.path: layer.codes or layer.variables for layer in solved}
