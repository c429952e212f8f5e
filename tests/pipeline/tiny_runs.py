"""Runs of tiny models in this process: plans, executors that fail on demand, and what is stored."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pipeline.worker.worker
from pipeline.executor.protocol import Handle, WorkerLostError
from pipeline.executor.work_spans import TimedWorker
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Report, Step
from pipeline.run.records import Manifest
from pipeline.run.worker_api import HeldSum
from pipeline.storage.object_store import ObjectStore
from pipeline.worker.model_state import ModelState
from pipeline.worker.statistics import finished
from pipeline.worker.worker import Worker
from quantizer import CalibrationStatistics
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.presets import shared_preset

TEXT = "The quick brown fox jumps over the lazy dog, again and again and again. " * 300
NUM_BLOCKS = 3
# What differs between executions, or is only a cache.
# The report is of what happened: when, and by which drivers and workers.
PASSING = ("events/", "activations/", "quarantine/", "leases/", "report.html")

SCHEMES: dict[str, dict[str, Any]] = {
    # The simplest of each: the solvers have tests of their own.
    "gptq": {"mode": "gptq", "weight_bits": 4, "group_size": 32},
    "drift": {"mode": "gptq", "weight_bits": 3, "group_size": 32, "drift_correction": 1.0},
    "awq": {"mode": "awq", "group_size": 32},
    "awq-foldable": {"mode": "awq", "group_size": 16, "num_grid_points": 10, "foldable": True},
    "float8": {"mode": "float8"},
    "int8": {"mode": "int8"},
}


@cache
def text_file() -> Path:
    """English to calibrate on."""
    folder = Path(tempfile.mkdtemp(prefix="texts-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "english.txt"
    path.write_text(TEXT)
    return path


def recipe(scheme: str, **calibration: Any) -> Recipe:
    """The simplest recipe of a scheme, calibrated on 20 windows of 128 tokens: 2 shards."""
    wanted = {"texts": [str(text_file())], "num_samples": 20, "sequence_length": 128}
    return recipe_from_dict(
        {"name": scheme, "scheme": SCHEMES[scheme], "calibration": wanted | calibration}
    )


def source(architecture: str = "Llama3", **options: Any) -> Path:
    return shared_preset(architecture, **{"num_blocks": NUM_BLOCKS, **options})


@cache
def planned(scheme: str, architecture: str = "Llama3", **calibration: Any) -> Planned:
    preset = read_preset(str(source(architecture)))
    return make_plan(preset, recipe(scheme, **calibration), threads=2)


def correcting_drift(plan: Plan) -> Plan:
    """The same plan, for layers that correct drift."""
    parts = [
        dataclasses.replace(
            part,
            layers=tuple(
                dataclasses.replace(
                    x, scheme=x.scheme and dataclasses.replace(x.scheme, drift_correction=1.0)
                )
                for x in part.layers
            ),
        )
        for part in plan.parts
    ]
    return dataclasses.replace(plan, parts=tuple(parts))


@cache
def model_state(plan_json: bytes, source_url: str) -> ModelState:
    """One for all workers of all tests, since building it again takes long."""
    return ModelState(Plan.from_json(plan_json), source_url)


class QuickWorker(Worker):
    """A worker that shares skeletons and compiled programs with all others."""

    def __init__(self, plan: Plan, source_url: str, run_url: str) -> None:
        found = model_state(plan.to_json(), source_url)
        original = pipeline.worker.worker.ModelState
        pipeline.worker.worker.ModelState = lambda plan, url: found  # type: ignore[assignment,misc]
        try:
            super().__init__(plan, source_url, run_url)
        finally:
            pipeline.worker.worker.ModelState = original  # type: ignore[misc]


def captured(
    worker: Worker, block: int, stage: int, subtree: range, values: Any, *solved: Any
) -> CalibrationStatistics:
    """The statistics that a worker captures."""
    return statistics_of(worker, worker.capture(block, stage, subtree, values, *solved))


def statistics_of(worker: Worker, held: HeldSum) -> CalibrationStatistics:
    """The statistics that a worker holds."""
    return finished(worker.send(held))


class _Lost(Handle[Any]):
    """The handle of a call whose worker was lost, or that needs the result of such a call."""


class CountingExecutor(LocalExecutor):
    """Counts calls, and loses workers on demand; as with Ray, `fetch` raises the loss.

    Attributes:
        calls: of each method.
        done: (method, first argument) in order.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        num_workers: int,
        *,
        lose: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Args: lose: (method, n): at its nth call, from 1, its worker dies and restarts."""
        super().__init__([make_worker() for _ in range(num_workers)])
        self._make_worker = make_worker
        self._lose = set(lose)
        self.calls: Counter[str] = Counter()
        self.done: list[tuple[str, Any]] = []

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        name = method.__name__
        self.calls[name] += 1
        if (name, self.calls[name]) in self._lose:
            self.restart(worker)
            return _Lost()
        if any(isinstance(arg, _Lost) for arg in args):
            return _Lost()
        self.done.append((name, args[0] if args else None))
        try:
            return super().submit(worker, method, *args, **kwargs)
        except WorkerLostError:
            return _Lost()

    def fetch(self, handles: Sequence[Handle[Any]]) -> list[Any]:
        if any(isinstance(handle, _Lost) for handle in handles):
            raise WorkerLostError("killed")
        return super().fetch(handles)

    def restart(self, worker: int) -> None:
        """Forget all that a worker holds, as Ray does when its process ends."""
        self._workers[worker] = TimedWorker(self._make_worker())

    def solved_parts(self) -> list[int]:
        """Parts of which some layer was solved, each once, in order."""
        wanted = ("solve", "quantize_alone")
        return list(dict.fromkeys(part for method, part in self.done if method in wanted))


ExecutorT = TypeVar("ExecutorT", bound=CountingExecutor)


def execute(
    given: Planned,
    store: ObjectStore,
    *,
    workers: int = 1,
    keep_every: int = 8,
    report: Report = lambda step: None,
    lose: Sequence[tuple[str, int]] = (),
    restart_after: int | None = None,
    make_executor: type[ExecutorT] = CountingExecutor,  # type: ignore[assignment]
    make_worker: type[QuickWorker] = QuickWorker,
    check_lease: Callable[[], None] = lambda: None,
) -> tuple[Manifest, ExecutorT]:
    """Claim and quantize; a second call resumes.

    Args:
        restart_after: once this part is committed, every worker restarts, and no call fails.
    """
    claim(store, given.plan, None if given.windows is None else given.windows.to_bytes())
    executor = make_executor(
        lambda: make_worker(given.plan, given.plan.source_url, store.root_url), workers, lose=lose
    )

    def tell(step: Step) -> None:
        report(step)
        if step.event == "committed" and step.part == restart_after:
            for worker in range(workers):
                executor.restart(worker)

    manifest = quantize(
        given.plan, store, executor, tell, keep_every=keep_every, check_lease=check_lease
    )
    return manifest, executor


def lasting(store: ObjectStore) -> dict[str, bytes]:
    """Everything that a run stores, except what may differ between executions."""
    return {key: store.get(key) for key in store.list() if not key.startswith(PASSING)}


class CrashError(Exception):
    """Ends a driver."""


def crash_at(part: int) -> Report:
    """Die as soon as a part is committed."""

    def report(step: Step) -> None:
        if step.event == "committed" and step.part == part:
            raise CrashError

    return report
