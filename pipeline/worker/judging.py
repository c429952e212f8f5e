"""What a worker judges: results beside their source, and what blocks and layers of them cost it.

A result is the run's own, or is made of parts of other runs of the same source. Their models are
kept from call to call, and so are the source's activations between blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jax import Array
from numpy.typing import NDArray

from pipeline.artifact.mixed_part import composed_file
from pipeline.artifact.parts import Part
from pipeline.artifact.weights_file import stored_bytes
from pipeline.errors import PlanMismatchError
from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity
from pipeline.plan import Plan, read_plan
from pipeline.run.commits import committed_file
from pipeline.run.worker_api import LayersAlone, PartsOfRuns, RunAt
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.block_weights import decoded_kernel
from pipeline.worker.devices import Devices
from pipeline.worker.evaluate import evaluate
from pipeline.worker.layer_units import Units
from pipeline.worker.model_state import ModelState
from pipeline.worker.replaced_blocks import ReplacedBlocks, by_artifact
from pipeline.worker.streamed_model import StreamedModel, artifact_model, source_model


class Judging:
    """Runs results and their source side by side, on all devices of a worker."""

    def __init__(
        self,
        model: ModelState,
        store: ObjectStore,
        devices: Devices,
        model_of: Callable[[Plan], ModelState],
    ) -> None:
        """Args: model: of the worker's own run.

        store: at its root.
        model_of: makes the model of another plan for the same source.
        """
        self._model, self._store, self._devices = model, store, devices
        self._model_of = model_of
        # Of other plans, by digest.
        self._others: dict[str, ModelState] = {}
        self._replaced: _Held | None = None

    def clear(self) -> None:
        """Let go of the source's activations."""
        self._replaced = None

    def evaluate(
        self,
        given: EvaluationSet,
        numbers: Sequence[int],
        tokens_per_pass: int,
        of: PartsOfRuns | None,
    ) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
        """See `WorkerApi.evaluate`."""
        shares = [numbers[device :: len(self._devices)] for device in range(len(self._devices))]
        layout, skeleton = self._model.layout, self._model.skeleton
        _ = self._model.evaluation_models  # built by one thread
        judged = self._own_artifact if of is None else self._composed(of)

        def compare(device: int) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
            return evaluate(
                source_model(self._model),
                judged(),
                layout,
                given,
                shares[device],
                predicts_tokens=skeleton.predicts_tokens,
                tokens_per_pass=tokens_per_pass,
            )

        found = [iter(rows) for rows in self._devices.each(compare)]
        return [next(found[i % len(found)]) for i in range(len(numbers))]

    def sensitivities(
        self, block: int, runs: Sequence[RunAt], given: EvaluationSet, tokens_per_pass: int
    ) -> list[list[WindowFidelity]]:
        """See `WorkerApi.sensitivities`; goes on with the activations of the call before."""
        held = self._held(runs, given, tokens_per_pass).replaced
        found = self._devices.each(lambda device: held[device].compare(block))
        return by_artifact(found, len(given.batches))

    def layer_errors(
        self, block: int, runs: Sequence[RunAt], given: EvaluationSet, tokens_per_pass: int
    ) -> list[tuple[LayersAlone, ...]]:
        """See `WorkerApi.layer_errors`; goes on with the activations of the call before."""
        held = self._held(runs, given, tokens_per_pass)
        units = held.replaced[0].units(block)
        files = [committed_file(open_store(run.url), block + 1) for run in runs]
        kernels = [
            partial(self._kernels, model, block, data)
            for model, data in zip(held.models, files, strict=True)
        ]
        found = self._devices.each(
            lambda device: held.replaced[device].compare_layers(block, units, kernels)
        )
        num_tokens = sum(count for _, count in found)
        errors = np.concatenate([errors for errors, _ in found])
        return [
            tuple(
                LayersAlone(
                    layers=unit,
                    # Exact sums, whatever device had which batch.
                    error=_finite_mean(errors[:, run, place], num_tokens),
                    num_tokens=num_tokens,
                    stored_bytes=sizes[place],
                )
                for place, unit in enumerate(units)
            )
            for run, sizes in enumerate(
                _unit_bytes(model.parts[block + 1], data, units)
                for model, data in zip(held.models, files, strict=True)
            )
        ]

    def _kernels(self, model: ModelState, block: int, data: bytes) -> dict[str, Array]:
        """What the layers of a run's block with a scheme multiply by, by path."""
        (_, graph), _ = self._model.evaluation_models
        variables = {str(v.path): v for v in graph.blocks[block].layer.weights}
        targets = {target.path: target for target in graph.blocks[block].targets}
        solved, _ = model.committed(block + 1, data)
        kernels = {}
        for layer in model.plan.parts[block + 1].layers:
            if layer.path in solved and layer.path in targets:
                target = targets[layer.path]
                variable, stored = variables[target.kernel_path], solved[layer.path]
                dtype = np.dtype(variable.dtype)
                kernels[layer.path] = decoded_kernel(target, layer, stored, dtype, variable)
        return kernels

    def holds(self, runs: Sequence[RunAt], given: EvaluationSet) -> bool:
        """Whether activations are kept for these."""
        return self._replaced is not None and self._replaced.wanted == _held_for(runs, given)

    def _held(self, runs: Sequence[RunAt], given: EvaluationSet, tokens_per_pass: int) -> _Held:
        if self._replaced is not None and self.holds(runs, given):
            return self._replaced
        _ = self._model.evaluation_models  # built by one thread
        parts = [_parts_of(run) for run in runs]
        opened = [self._composed(of) for of in parts]

        def replaced(device: int) -> ReplacedBlocks:
            return ReplacedBlocks(
                source_model(self._model),
                [open_artifact() for open_artifact in opened],
                self._model.layout,
                given,
                range(device, len(given.batches), len(self._devices)),
                predicts_tokens=self._model.skeleton.predicts_tokens,
                tokens_per_pass=tokens_per_pass,
            )

        self._replaced = _Held(
            wanted=_held_for(runs, given),
            replaced=self._devices.each(replaced),
            models=[self._model_for(of.plan) for of in parts],
        )
        return self._replaced

    def _own_artifact(self) -> StreamedModel:
        return artifact_model(self._model, self._store)

    def _composed(self, of: PartsOfRuns) -> Callable[[], StreamedModel]:
        """What opens an artifact that is made of parts of runs, for a device of its own."""
        model = self._model_for(of.plan)
        _ = model.evaluation_models  # built by one thread
        return lambda: artifact_model(model, self._store, partial(composed_file, of, model.parts))

    def _model_for(self, plan: Plan) -> ModelState:
        if plan.digest == self._model.plan.digest:
            return self._model
        if plan.digest not in self._others:
            self._others[plan.digest] = self._model_of(plan)
        return self._others[plan.digest]


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What is kept between calls.

    Attributes:
        wanted: what it is for.
        replaced: for each device.
        models: of the runs.
    """

    wanted: object
    replaced: list[ReplacedBlocks]
    models: list[ModelState]


def _finite_mean(sums: NDArray[np.float64], count: int) -> float | None:
    if not np.all(np.isfinite(sums)):
        return None
    return math.fsum(sums.tolist()) / max(count, 1)


def _unit_bytes(part: Part, data: bytes, units: Units) -> list[int]:
    """What the layers' arrays take in a part's file."""
    groups = {stored.layer_path: stored.h5_group for stored in part.variables}
    groups |= {str(stored.variable.path): stored.h5_group for stored in part.variables}
    sizes = stored_bytes(data)
    return [sum(sizes[name] for name in {groups[path] for path in unit}) for unit in units]


def _held_for(runs: Sequence[RunAt], given: EvaluationSet) -> object:
    return tuple(runs), given.windows and given.windows.digest


def _parts_of(run: RunAt) -> PartsOfRuns:
    plan = read_plan(open_store(run.url))
    if plan.digest != run.plan_digest:
        raise PlanMismatchError(
            f"{run.url}: another run has taken its place since the command began; start it again"
        )
    return PartsOfRuns(plan=plan, run_urls=(run.url,) * len(plan.parts))
