"""What a driver has done by processes that have JAX and Keras: planning, and starting workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.executor.protocol import Executor, ExecutorError, FunctionRunner, WorkerLostError
from pipeline.fidelity import Fidelity, average
from pipeline.plan import Plan, read_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.worker_api import WorkerApi
from pipeline.storage.object_store import open_store

_WINDOW = 512
"""Tokens in an evaluation window where no calibration says otherwise."""
_MOST_LOSSES = 5


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What of a plan can be found out without planning again; see `Plan`."""

    source_files_sha256: str
    machine: dict[str, str]
    versions: dict[str, str]


def plan_run(
    runner: FunctionRunner, source_url: str, recipe: Recipe, threads: int
) -> tuple[Plan, bytes | None]:
    """The plan, and the token windows that it names, serialized.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    plan_json, windows = runner.run(_plan, source_url, recipe, threads)
    return Plan.from_json(plan_json), windows


def identity(runner: FunctionRunner, source_url: str, threads: int) -> Identity:
    """What a plan made now would say of source, machine and versions.

    Weights are not read: each part's are checked against the plan when they are.

    Raises:
        PipelineError: the source cannot be read.
    """
    return runner.run(_identity, source_url, threads)


def evaluation_windows(
    runner: FunctionRunner, source_url: str, plan: Plan, texts: Sequence[str], num_windows: int
) -> bytes:
    """Token windows of texts to judge a result by, serialized.

    They are as long as calibration's; without one, 512 tokens, or what the model takes.

    Raises:
        PipelineError: texts that are missing, unreadable or too few.
    """
    length = _WINDOW if plan.tokens is None else plan.tokens.sequence_length
    calibration = Calibration(
        texts=tuple(texts), num_samples=num_windows, sequence_length=length, sampling="sequential"
    )
    return runner.run(_windows, source_url, calibration, plan.tokens is None)


def measure(executor: Executor, windows: bytes, num_windows: int) -> Fidelity:
    """Compare source and finished artifact over windows, spread over the workers.

    Raises:
        ExecutorError: workers are lost again and again.
    """
    shares = [
        list(range(w, num_windows, executor.num_workers)) for w in range(executor.num_workers)
    ]
    for _ in range(_MOST_LOSSES):
        try:
            measured = executor.fetch(
                [
                    executor.submit(worker, WorkerApi.evaluate, windows, share)
                    for worker, share in enumerate(shares)
                    if share
                ]
            )
            break
        except WorkerLostError:
            executor.recover()
    else:
        raise ExecutorError(
            f"workers were lost {_MOST_LOSSES} times while they evaluated; check the memory and "
            "logs of the cluster's nodes, then run quantfleet evaluate"
        )
    by_window = {
        index: fidelity
        for share, several in zip(filter(None, shares), measured, strict=True)
        for index, fidelity in zip(share, several, strict=True)
    }
    return average([by_window[index] for index in sorted(by_window)])


# The functions below run where JAX and Keras are; the driver, which imports this module, imports
# neither.


def start_worker(source_url: str, run_url: str) -> Callable[[], WorkerApi]:
    """Import what takes long; returns a function that opens the worker, once the run is claimed.

    Raises:
        ExecutorError: Keras runs on another backend.
    """
    import keras

    from pipeline.worker.worker import Worker

    if keras.backend.backend() != "jax":
        raise ExecutorError(f"a worker started with Keras on {keras.backend.backend()}, not JAX")
    # The plan comes from storage: it is too large for an argument that restarts must find again.
    return lambda: Worker(read_plan(open_store(run_url)), source_url, run_url)


def _plan(source_url: str, recipe: Recipe, threads: int) -> tuple[bytes, bytes | None]:
    from pipeline.model.preset import read_preset
    from pipeline.planning import make_plan

    planned = make_plan(read_preset(source_url), recipe, threads=threads)
    windows = planned.windows
    return planned.plan.to_json(), None if windows is None else windows.to_bytes()


def _identity(source_url: str, threads: int) -> Identity:
    from pipeline.model.preset import read_preset
    from pipeline.planning import machine, versions
    from pipeline.weights.source import open_source

    return Identity(
        source_files_sha256=open_source(read_preset(source_url)).files_digest(),
        machine=machine(threads),
        versions=versions(),
    )


def _windows(source_url: str, calibration: Calibration, fit: bool) -> bytes:
    """Args: fit: shorten windows to what the model takes."""
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning import most_tokens, token_windows

    preset = read_preset(source_url)
    skeleton = build_skeleton(preset)
    most = most_tokens(skeleton)
    if fit and most is not None and most < calibration.sequence_length:
        calibration = calibration.model_copy(update={"sequence_length": most})
    return token_windows(preset, skeleton, calibration).to_bytes()
