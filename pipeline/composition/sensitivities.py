"""What each block of each run alone costs the model: measured once, kept, and used for any budget.

A record is named by what decides it: the source, the windows of text that it was measured on, and
the block's own file. So a run that is added later has only its own blocks measured, and blocks
that runs have in common are measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

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
_PREFIX = f"{COMPOSITION_PREFIX}sensitivities/"
_MOST_LOSSES = 5


@dataclass(frozen=True, kw_only=True)
class Sensitivity(StoredRecord):
    """What one block of a run costs the model that is the source everywhere else.

    Attributes:
        part: the block's.
        weights_sha256: of the part's file of weights.
        source_sha256: of the whole source.
        windows_sha256: of the windows of text; num_windows, and count of the tokens compared.
        figure: what the cost is: KL(source ‖ changed) of the next token, in nats, mean over all
            tokens; of models that predict no tokens, 1 - the mean cosine of the outputs.
        cost: None if the outputs are not finite.
        standard_error: of the cost, from the windows' own means; None of a single window.
    """

    part: Annotated[int, Field(ge=1, le=99_999)]
    weights_sha256: Digest
    source_sha256: Digest
    windows_sha256: Digest
    num_windows: int
    count: int
    figure: Literal["divergence", "cosine"]
    cost: float | None
    standard_error: float | None

    @classmethod
    def of(
        cls, run: GivenRun, part: int, windows_sha256: str, found: Sequence[WindowFidelity]
    ) -> Self:
        """The sensitivity from what was found of each window."""
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
            part=part,
            weights_sha256=run.records[part].sha256,
            source_sha256=run.plan.source_digest,
            windows_sha256=windows_sha256,
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
    assert given.windows is not None
    windows_sha256 = given.windows.digest
    context = digest_of([runs[0].plan.source_digest, runs[0].plan.recipe.dtype, windows_sha256])
    num_blocks = runs[0].plan.num_blocks

    def key(run: GivenRun, part: int) -> str:
        weights = run.records[part].sha256
        return f"{_PREFIX}{context}/block-{part - 1:05d}-{weights[:16]}.json"

    kept_at = {run.store.root_url: store for run, store in zip(runs, stores, strict=True)}
    known: dict[str, Sensitivity] = {}
    present: dict[str, ObjectStore] = {}
    for store in {store.root_url: store for store in stores}.values():
        for name in store.list(f"{_PREFIX}{context}/"):
            present.setdefault(name, store)
    for name in sorted({key(run, part) for run in runs for part in range(1, num_blocks + 1)}):
        if name in present:
            try:
                known[name] = Sensitivity.read(present[name], name)
            except (DamagedObjectError, MissingObjectError) as error:
                tell(f"{error}; it is measured again")
                present[name].delete(name)
    losses = 0
    while True:
        pending = {
            block: list(missing.values())
            for block in range(num_blocks)
            if (missing := {n: run for run in runs if (n := key(run, block + 1)) not in known})
        }
        if not pending:
            break
        before = len(known)
        try:
            # Artifacts are those that any block needs, so that workers go on with the same ones.
            asked = [run for run in runs if any(run in some for some in pending.values())]
            at = [RunAt(url=x.store.root_url, plan_digest=x.plan.digest) for x in asked]
            handles = {
                block: executor.submit(
                    # The first blocks have most behind them: every worker gets some of them.
                    place % executor.num_workers,
                    WorkerApi.sensitivities,
                    block,
                    at,
                    given,
                    tokens_per_pass,
                )
                for place, block in enumerate(pending)
            }
            for number, (block, handle) in enumerate(handles.items(), 1):
                [found] = executor.fetch([handle])
                for run, rows in zip(asked, found, strict=True):
                    made = Sensitivity.of(run, block + 1, windows_sha256, rows)
                    name = key(run, block + 1)
                    if name not in known:
                        kept_at[run.store.root_url].put(name, made.to_json())
                        known[name] = made
                tell(f"block {block}: measured, {number} of {len(handles)}")
        except WorkerLostError as error:
            losses = losses + 1 if len(known) == before else 1
            if losses > _MOST_LOSSES:
                raise ExecutorError(
                    f"workers were lost {_MOST_LOSSES} times while they measured one block, the "
                    f"last by {error}; check the memory and logs of the cluster's nodes, then "
                    "repeat the command: what is measured is kept"
                ) from error
            executor.recover()
    return tuple(tuple(known[key(run, block + 1)] for run in runs) for block in range(num_blocks))
