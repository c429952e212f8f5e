"""What each block of each run alone costs the model: measured once, kept, and used for any budget.

A record is named by what decides it: the source, the windows of text that it was measured on, and
the block's own file. So a run that is added later has only its own blocks measured, and blocks
that runs have in common are measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

import numpy as np
from pydantic import Field

from pipeline.canonical import digest_of
from pipeline.composition.composed_plan import GivenRun
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import Executor, ExecutorError, WorkerLostError
from pipeline.fidelity import WindowFidelity
from pipeline.run.records import Digest
from pipeline.run.worker_api import RunAt, WorkerApi
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

COMPOSITION_PREFIX = "composition/"
"""Of what a composition keeps in its folder besides what every run does."""
_MOST_LOSSES = 5
_PASSES_HELD = 3
"""Of how many passes of a block a worker holds the source's activations at once: they take less
than what a block computes for one pass."""


@dataclass(frozen=True, kw_only=True)
class MeasuredBlock(StoredRecord):
    """Names the block of a run that something was measured of, and on what.

    Attributes:
        part: the block's.
        weights_sha256: of the part's file of weights.
        source_sha256: of the whole source.
        windows_sha256: of the windows of text that it was measured on.
    """

    part: Annotated[int, Field(ge=1, le=99_999)]
    weights_sha256: Digest
    source_sha256: Digest
    windows_sha256: Digest

    @staticmethod
    def named(run: GivenRun, part: int, windows_sha256: str) -> dict[str, Any]:
        """These fields for a run's block."""
        return {
            "part": part,
            "weights_sha256": run.records[part].sha256,
            "source_sha256": run.plan.source_digest,
            "windows_sha256": windows_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class Sensitivity(MeasuredBlock):
    """What one block of a run costs the model that is the source everywhere else.

    Attributes:
        num_windows: of text; count: of the tokens compared.
        figure: what the cost is: KL(source ‖ changed) of the next token, in nats, mean over all
            tokens; of models that predict no tokens, 1 - the mean cosine of the outputs.
        cost: None if the outputs are not finite.
        standard_error: of the cost, from the windows' own means; None of a single window.
    """

    num_windows: int
    count: int
    figure: Literal["divergence", "cosine"]
    cost: float | None
    standard_error: float | None

    @classmethod
    def of(
        cls, run: GivenRun, part: int, windows_sha256: str, given: Sequence[list[WindowFidelity]]
    ) -> Self:
        """The sensitivity from what was found of each window."""
        found = [window for some in given for window in some]
        predicts = any(window.source_loss for window in found)
        count = sum(window.count for window in found)
        sums = [w.divergence if predicts else w.count - w.cosine for w in found]
        means = [total / max(w.count, 1) for total, w in zip(sums, found, strict=True)]
        cost = math.fsum(sums) / max(count, 1)
        error = None
        if len(means) > 1 and math.isfinite(cost):
            error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
        broken = not math.isfinite(cost) or any(window.result_broken_at for window in found)
        return cls(
            **cls.named(run, part, windows_sha256),
            num_windows=len(found),
            count=count,
            figure="divergence" if predicts else "cosine",
            # Of equal outputs rounding may leave less than nothing.
            cost=None if broken else max(cost, 0.0),
            standard_error=error,
        )


def measure_blocks(
    executor: Executor,
    stores: Sequence[ObjectStore],
    runs: Sequence[GivenRun],
    given: EvaluationSet,
    *,
    tokens_per_pass: int,
    tell: Callable[[str], None],
) -> tuple[tuple[Sensitivity, ...], ...]:
    """Measure what has not been, block by block, spread over the workers; each is kept at once.

    Args:
        stores: of each run, where to keep them; each record is looked for in all of these.
        given: windows of text without a name.
        tokens_per_pass: how many have room on a worker's device.
        tell: is told how far it is, in words.

    Returns:
        For each block, for each run.

    Raises:
        ExecutorError: workers were lost again and again.
    """
    return measured(
        Sensitivity,
        WorkerApi.sensitivities,
        f"{COMPOSITION_PREFIX}sensitivities/",
        executor,
        stores,
        runs,
        given,
        tokens_per_pass=tokens_per_pass,
        tell=tell,
    )


class BlockRecord(Protocol):
    """What is kept of a block of a run."""

    @classmethod
    def of(cls, run: GivenRun, part: int, windows_sha256: str, given: Sequence[Any]) -> Self:
        """The record of what workers found, for each of the parts that windows came in."""

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self: ...

    def to_json(self) -> bytes: ...


RecordT = TypeVar("RecordT", bound=BlockRecord)


def measured(
    kind: type[RecordT],
    method: Callable[..., list[Any]],
    prefix: str,
    executor: Executor,
    stores: Sequence[ObjectStore],
    runs: Sequence[GivenRun],
    given: EvaluationSet,
    *,
    tokens_per_pass: int,
    tell: Callable[[str], None],
) -> tuple[tuple[RecordT, ...], ...]:
    """What is kept of every block of every run, measured where it is not known.

    Workers hold the source's activations of all windows that they are given, twice. Many windows
    come one part after another; what is found of a block is kept after the last.

    Args:
        kind: of the records.
        method: of `WorkerApi`: (block, runs, given, tokens_per_pass) → what is found, for each run.
        prefix: of the records' keys.
        executor, stores, runs, given, tokens_per_pass, tell: as of `measure_blocks`.
    """
    assert given.windows is not None
    windows_sha256 = given.windows.digest
    context = digest_of([runs[0].plan.source_digest, runs[0].plan.recipe.dtype, windows_sha256])
    num_blocks = runs[0].plan.num_blocks

    def key(run: GivenRun, part: int) -> str:
        weights = run.records[part].sha256
        return f"{prefix}{context}/block-{part - 1:05d}-{weights[:16]}.json"

    kept_at = {run.store.root_url: store for run, store in zip(runs, stores, strict=True)}
    known: dict[str, RecordT] = {}
    present: dict[str, ObjectStore] = {}
    for store in {store.root_url: store for store in stores}.values():
        for name in store.list(f"{prefix}{context}/"):
            present.setdefault(name, store)
    for name in sorted({key(run, part) for run in runs for part in range(1, num_blocks + 1)}):
        if name in present:
            try:
                known[name] = kind.read(present[name], name)
            except (DamagedObjectError, MissingObjectError) as error:
                tell(f"{error}; it is measured again")
                present[name].delete(name)
    parts = _parts(given, tokens_per_pass)
    found: dict[tuple[str, int], Any] = {}
    losses = 0
    while True:
        pending = {
            (number, block): missing
            for number in range(len(parts))
            for block in range(num_blocks)
            if (
                missing := [
                    run
                    for run in runs
                    if (name := key(run, block + 1)) not in known and (name, number) not in found
                ]
            )
        }
        if not pending:
            break
        before = len(known), len(found)
        try:
            # Artifacts are those that any block needs, so that workers go on with the same ones.
            asked = [run for run in runs if any(run in some for some in pending.values())]
            at = [RunAt(url=x.store.root_url, plan_digest=x.plan.digest) for x in asked]
            handles = {
                (number, block): executor.submit(
                    # The first blocks have most behind them: every worker gets some of them.
                    place % executor.num_workers,
                    method,
                    block,
                    at,
                    parts[number],
                    tokens_per_pass,
                )
                for place, (number, block) in enumerate(pending)
            }
            for done, ((number, block), handle) in enumerate(handles.items(), 1):
                [of_runs] = executor.fetch([handle])
                for run, one in zip(asked, of_runs, strict=True):
                    name = key(run, block + 1)
                    found[name, number] = one
                    each = [found.get((name, i)) for i in range(len(parts))]
                    if name not in known and None not in each:
                        made = kind.of(run, block + 1, windows_sha256, each)
                        kept_at[run.store.root_url].put(name, made.to_json())
                        known[name] = made
                tell(f"block {block}: measured, {done} of {len(handles)}")
        except WorkerLostError as error:
            losses = losses + 1 if (len(known), len(found)) == before else 1
            if losses > _MOST_LOSSES:
                raise ExecutorError(
                    f"workers were lost {_MOST_LOSSES} times while they measured one block, the "
                    f"last by {error}; check the memory and logs of the cluster's nodes, then "
                    "repeat the command: what is measured is kept"
                ) from error
            executor.recover()
    return tuple(tuple(known[key(run, block + 1)] for run in runs) for block in range(num_blocks))


def _parts(given: EvaluationSet, tokens_per_pass: int) -> list[EvaluationSet]:
    """Windows in parts of a few passes each."""
    assert given.windows is not None
    num_windows, length = given.windows.tokens.shape
    size = max(1, _PASSES_HELD * tokens_per_pass // max(1, length))
    if size >= num_windows:
        return [given]
    return [
        EvaluationSet(windows=given.windows.chosen(range(a, min(a + size, num_windows))))
        for a in range(0, num_windows, size)
    ]
