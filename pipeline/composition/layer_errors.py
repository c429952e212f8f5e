"""What layers of a block alone do to its output, for each run: measured once, kept, and reused.

What a block costs the model is measured (see `sensitivities`). How much of that is due to each of
its layers is taken to be its share of the errors that they make in the block's output, each in the
place of the source's layer, on the source's own inputs: layers of one block are about as far from
the model's answer, so that equal errors there are taken to cost as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pipeline.composition.composed_plan import GivenRun
from pipeline.composition.sensitivities import COMPOSITION_PREFIX, MeasuredBlock, measured
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import Executor
from pipeline.run.worker_api import LayersAlone, WorkerApi
from pipeline.storage.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True)
class LayerErrors(MeasuredBlock):
    """What each unit of a block's layers does to the block's output.

    Attributes:
        units: layers that have to be of one run; none of a block that gives no hidden states, whose
            layers cannot be told apart so.
    """

    units: tuple[LayersAlone, ...]

    @classmethod
    def of(
        cls,
        run: GivenRun,
        part: int,
        windows_sha256: str,
        given: Sequence[tuple[LayersAlone, ...]],
    ) -> Self:
        """The record of what workers found, for each of the parts that windows came in."""
        return cls(
            **cls.named(run, part, windows_sha256),
            units=tuple(map(_joined, zip(*given, strict=True))),
        )

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Of each unit, how much of the block's cost is its own; None if they cannot be told."""
        errors = [unit.error for unit in self.units]
        known = [error for error in errors if error is not None]
        if not errors or len(known) < len(errors):
            return None
        total = math.fsum(known)
        return tuple(error / total if total else 1 / len(known) for error in known)


def _joined(parts: Sequence[LayersAlone]) -> LayersAlone:
    """One unit, over all windows."""
    num_tokens = sum(one.num_tokens for one in parts)
    sums = [one.error * one.num_tokens for one in parts if one.error is not None]
    known = len(sums) == len(parts)
    return replace(
        parts[0],
        error=math.fsum(sums) / max(num_tokens, 1) if known else None,
        num_tokens=num_tokens,
    )


def measure_layers(
    executor: Executor,
    stores: Sequence[ObjectStore],
    runs: Sequence[GivenRun],
    given: EvaluationSet,
    *,
    tokens_per_pass: int,
    tell: Callable[[str], None],
) -> tuple[tuple[LayerErrors, ...], ...]:
    """As `measure_blocks`, of the layers in each block."""
    return measured(
        LayerErrors,
        WorkerApi.layer_errors,
        f"{COMPOSITION_PREFIX}layers/",
        executor,
        stores,
        runs,
        given,
        tokens_per_pass=tokens_per_pass,
        tell=tell,
    )
