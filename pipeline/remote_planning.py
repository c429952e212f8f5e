"""From what a user asks for to a claimed run: planned by a worker, not in the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.executor.protocol import Executor, ExecutorError, WorkerLostError
from pipeline.fidelity import Fidelity, average
from pipeline.plan import Plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.driver import claim
from pipeline.storage.object_store import ObjectStore

_WINDOW = 512
"""Tokens in an evaluation window where no calibration says otherwise."""
_MOST_LOSSES = 5


def plan_run(
    executor: Executor, source_url: str, recipe: Recipe, threads: int
) -> tuple[Plan, bytes | None]:
    """The plan, and the token windows that it names, serialized.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    plan_json, windows = executor.run(_plan, source_url, recipe.to_dict(), threads)
    return Plan.from_json(plan_json), windows


def claim_run(store: ObjectStore, plan: Plan, windows: bytes | None) -> Plan:
    """Write plan and token windows into the run's directory, or find them there.

    Raises:
        PlanMismatchError: the directory belongs to another plan, or holds other things.
    """
    return claim(store, plan, windows)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What of a plan can be found out without planning again; see `Plan`."""

    source_files_sha256: str
    machine: dict[str, str]
    versions: dict[str, str]


def identity(executor: Executor, source_url: str, threads: int) -> Identity:
    """What a plan made now would say of source, machine and versions.

    Weights are not read: each part's are checked against the plan when they are.

    Raises:
        PipelineError: the source cannot be read.
    """
    return Identity(**executor.run(_identity, source_url, threads))


def evaluation_windows(
    executor: Executor, source_url: str, plan: Plan, texts: Sequence[str], num_windows: int
) -> bytes:
    """Token windows of texts to judge a result by, serialized.

    They are as long as calibration's; without one, 512 tokens, or what the model takes.

    Raises:
        PipelineError: texts that are missing, unreadable or too few.
    """
    length = _WINDOW if plan.tokens is None else plan.tokens.sequence_length
    wanted = Calibration(
        texts=tuple(texts), num_samples=num_windows, sequence_length=length, sampling="sequential"
    )
    values = wanted.model_dump(mode="json")
    return bytes(executor.run(_windows, source_url, values, plan.tokens is None))


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
            found = executor.fetch(
                [
                    executor.submit(w, "compare", windows, share)
                    for w, share in enumerate(shares)
                    if share
                ]
            )
            break
        except WorkerLostError:
            executor.revive()
    else:
        raise ExecutorError(
            f"workers were lost {_MOST_LOSSES} times while they evaluated; check the memory and "
            "logs of the cluster's nodes, then run quantfleet evaluate"
        )
    by_window = {
        index: one
        for share, several in zip(filter(None, shares), found, strict=True)
        for index, one in zip(share, several, strict=True)
    }
    return average([by_window[index] for index in sorted(by_window)])


def _plan(source_url: str, recipe: dict[str, Any], threads: int) -> tuple[bytes, bytes | None]:
    # Here, so that the driver, which imports this module, imports neither JAX nor Keras.
    from pipeline.model.preset import read_preset
    from pipeline.planning import make_plan

    planned = make_plan(read_preset(source_url), recipe_from_dict(recipe), threads=threads)
    windows = planned.windows
    return planned.plan.to_json(), None if windows is None else windows.to_bytes()


def _identity(source_url: str, threads: int) -> dict[str, Any]:
    from pipeline.model.preset import read_preset
    from pipeline.planning import machine, versions
    from pipeline.weights.source import open_source

    return {
        "source_files_sha256": open_source(read_preset(source_url)).files_digest(),
        "machine": machine(threads),
        "versions": versions(),
    }


def _windows(source_url: str, calibration: dict[str, Any], fit: bool) -> bytes:
    """Args: fit: shorten windows to what the model takes."""
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning import most_tokens, token_windows

    preset = read_preset(source_url)
    skeleton = build_skeleton(preset)
    wanted = Calibration.model_validate(calibration)
    most = most_tokens(skeleton)
    if fit and most is not None and most < wanted.sequence_length:
        wanted = wanted.model_copy(update={"sequence_length": most})
    return token_windows(preset, skeleton, wanted).to_bytes()
