"""What a worker judges: results beside their source, and what blocks of results cost it.

A result is the run's own, or is made of parts of other runs of the same source. Their models are
kept from call to call, and so are the source's activations between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.errors import PlanMismatchError
from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity
from pipeline.plan import Plan, read_plan
from pipeline.run.worker_api import PartsOfRuns, RunAt
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.devices import Devices
from pipeline.worker.evaluate import evaluate
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
        self._replaced: tuple[object, list[ReplacedBlocks]] | None = None

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
        held = self._held(runs, given, tokens_per_pass)
        found = self._devices.each(lambda device: held[device].compare(block))
        return by_artifact(found, len(given.batches))

    def holds(self, runs: Sequence[RunAt], given: EvaluationSet) -> bool:
        """Whether activations are kept for these."""
        return self._replaced is not None and self._replaced[0] == _held_for(runs, given)

    def _held(
        self, runs: Sequence[RunAt], given: EvaluationSet, tokens_per_pass: int
    ) -> list[ReplacedBlocks]:
        if self._replaced is not None and self.holds(runs, given):
            return self._replaced[1]
        _ = self._model.evaluation_models  # built by one thread
        opened = [self._composed(_parts_of(run)) for run in runs]

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

        found = self._devices.each(replaced)
        self._replaced = _held_for(runs, given), found
        return found

    def _own_artifact(self) -> StreamedModel:
        return artifact_model(self._model, self._store)

    def _composed(self, of: PartsOfRuns) -> Callable[[], StreamedModel]:
        """What opens an artifact that is made of parts of runs, for a device of its own."""
        model = self._model_for(of.plan)
        _ = model.evaluation_models  # built by one thread
        stores = {part: open_store(url) for part, url in enumerate(of.run_urls)}
        return lambda: artifact_model(model, self._store, stores)

    def _model_for(self, plan: Plan) -> ModelState:
        if plan.digest == self._model.plan.digest:
            return self._model
        if plan.digest not in self._others:
            self._others[plan.digest] = self._model_of(plan)
        return self._others[plan.digest]


def _held_for(runs: Sequence[RunAt], given: EvaluationSet) -> object:
    return tuple(runs), given.windows and given.windows.digest


def _parts_of(run: RunAt) -> PartsOfRuns:
    plan = read_plan(open_store(run.url))
    if plan.digest != run.plan_digest:
        raise PlanMismatchError(
            f"{run.url}: another run has taken its place since the command began; start it again"
        )
    return PartsOfRuns(plan=plan, run_urls=(run.url,) * len(plan.parts))
