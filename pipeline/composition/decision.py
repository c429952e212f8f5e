"""What a composition was to be, what was chosen and measured for it, and which result was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from pipeline.composition.choice import Choice, Choices, Option
from pipeline.composition.composed_plan import GivenLayers, GivenRun, Pick, part_bytes
from pipeline.composition.sensitivities import COMPOSITION_PREFIX, Sensitivity
from pipeline.composition.target import Target, block_weights
from pipeline.errors import PipelineError, UnusableResultError
from pipeline.fidelity import Fidelity
from pipeline.run.records import Digest
from pipeline.storage.record import STRICT, StoredRecord


def blocks_bytes(run: GivenRun) -> int:
    """Of all blocks of a run, as stored."""
    return sum(map(part_bytes, run.records[1:]))


def check_target(target: Target, runs: Sequence[GivenRun]) -> None:
    """Refuse a target that no choice can meet; sizes alone are enough to know.

    Raises:
        PipelineError: it is too small.
    """
    smallest = [
        min((part_bytes(run.records[part]), number) for number, run in enumerate(runs))
        for part in range(1, runs[0].plan.num_blocks + 1)
    ]
    least, most = sum(num_bytes for num_bytes, _ in smallest), target.block_bytes(runs[0])
    if least > most:
        bits = math.ceil(8000 * least / block_weights(runs[0])) / 1000
        whole = least + part_bytes(runs[0].records[0])
        raise PipelineError(
            f"{target}: the smallest blocks of these runs make {bits:.3f} bits a weight, {whole} "
            "bytes with what is outside the blocks; raise the target, or name a run of fewer bits"
        )


def options_of(
    runs: Sequence[GivenRun], sensitivities: Sequence[Sequence[Sensitivity]]
) -> tuple[Choices, list[list[int]]]:
    """What there is to choose from: for each block, the runs whose block gives finite answers.

    Returns:
        the choices, and of each block the number of each option's run.

    Raises:
        UnusableResultError: no run's block does.
    """
    options, numbers = [], []
    for block, of_block in enumerate(sensitivities):
        usable = [n for n, sensitivity in enumerate(of_block) if sensitivity.cost is not None]
        if not usable:
            raise UnusableResultError(
                f"block {block}: none of the {len(runs)} runs has one with which the model's "
                "answers are finite; name a run of more bits, or in another dtype"
            )
        numbers.append(usable)
        options.append(
            [
                Option(
                    size_bytes=part_bytes(runs[n].records[block + 1]),
                    cost=float(of_block[n].cost or 0.0),
                )
                for n in usable
            ]
        )
    return Choices(options), numbers


def picked_runs(choice: Choice, numbers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The number of the run that gives each block."""
    return tuple(of_block[one] for of_block, one in zip(numbers, choice.picked, strict=True))


def measured_cost(fidelity: Fidelity) -> float:
    """What a whole result costs, as `Sensitivity.cost` is for a block: over all sets of texts.

    Infinite if its answers are not finite.
    """
    if fidelity.not_finite is not None:
        return math.inf
    total, count = 0.0, 0
    for one in fidelity.texts.values():
        cost = one.divergence
        if cost is None:
            assert one.cosine is not None
            cost = 1 - one.cosine
        total += cost * one.count
        count += one.count
    return total / count


@dataclass(frozen=True, kw_only=True)
class JudgedRun:
    """A run that blocks were taken from.

    Attributes:
        size_bytes: of all its weights files.
        expected: the sum of what its blocks alone cost; None if one gives answers not finite.
        measured: what it costs; None if it was not measured, since it is larger than the target,
            or since there was nothing to compare. None too where answers are not finite.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    recipe: str
    plan_digest: Digest
    manifest_sha256: Digest
    size_bytes: int
    expected: float | None
    measured: float | None


@dataclass(frozen=True, kw_only=True)
class OtherChoice:
    """The composition that measured no better, of that by blocks and that by layers.

    Attributes:
        by: what its runs give.
        size_bytes, expected, measured: as of `Decision`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    by: Literal["blocks", "layers"]
    size_bytes: int
    expected: float
    measured: float | None


@dataclass(frozen=True, kw_only=True)
class Decision(StoredRecord):
    """How a composition came about.

    Attributes:
        windows_sha256: of what its sensitivities were measured on.
        judged_on: digest of what composition and uniform runs were compared on.
        picked: of each block, the number of the run chosen for it.
        size_bytes: of the choice, all weights files.
        expected: the sum of what its blocks alone cost.
        measured: what it costs.
        kept: the number of the run that is kept whole, since it measured better; None if the
            choice is kept.
        by_layers: whether layers of a block might come from several runs; omitted if not.
        layers: those that others give than `picked` says; omitted where there are none.
        other: what else was measured; omitted where there was one choice.
    """

    key: ClassVar[str] = f"{COMPOSITION_PREFIX}decision.json"

    target: Target
    windows_sha256: Digest
    judged_on: Digest
    runs: tuple[JudgedRun, ...]
    picked: tuple[int, ...]
    size_bytes: int
    expected: float
    measured: float | None
    kept: int | None
    by_layers: bool = False
    layers: tuple[GivenLayers, ...] = ()
    other: OtherChoice | None = None

    def content(self) -> dict[str, Any]:
        values = super().content()
        for name in ("by_layers", "layers", "other"):
            if not values[name]:
                del values[name]
        return values

    @property
    def question(self) -> dict[str, Any]:
        """What the decision depends on, but for what was measured."""
        return question(
            self.target,
            [run.manifest_sha256 for run in self.runs],
            self.windows_sha256,
            self.judged_on,
            by_layers=self.by_layers,
        )

    @property
    def outcome(self) -> str:
        """Which result is kept, and why, in words."""
        size = f"{self.size_bytes:,} bytes"
        measured = "not finite" if self.measured is None else f"{self.measured:.5f}"
        if len(set(self.picked)) == 1 and not self.layers:
            only = self.runs[self.picked[0]].recipe
            return f"the best choice within {self.target} is the run {only} as it is, {size}"
        composition = "composition"
        if self.by_layers:
            composition = f"composition of {'layers' if self.layers else 'whole blocks'}"
        if self.kept is not None:
            run = self.runs[self.kept]
            return (
                f"the {composition} ({size}) costs {measured}, and the run {run.recipe} "
                f"({run.size_bytes:,} bytes) {run.measured:.5f}: the run is kept, and the output "
                "is a copy of it"
            )
        others = [
            f"{run.recipe} {run.measured:.5f} ({run.size_bytes:,} bytes)"
            for run in self.runs
            if run.measured is not None
        ]
        beside = f"; of runs within the target: {', '.join(others)}" if others else ""
        if self.other is not None:
            cost = "not finite" if self.other.measured is None else f"{self.other.measured:.5f}"
            beside = f"; by {self.other.by} {cost} ({self.other.size_bytes:,} bytes){beside}"
        return (
            f"the {composition}, {size}, costs {measured}, where {self.expected:.5f} was expected "
            f"of its blocks alone{beside}"
        )

    @property
    def givers(self) -> tuple[int, ...]:
        """Of each block, the number of the run that gives it to the result that is kept."""
        return self.picked if self.kept is None else (self.kept,) * len(self.picked)

    @property
    def given(self) -> Pick:
        """All that is given to the result that is kept."""
        return self.givers, self.layers if self.kept is None else ()


def question(
    target: Target,
    manifests: Sequence[str],
    windows_sha256: str,
    judged_on: str,
    *,
    by_layers: bool = False,
) -> dict[str, Any]:
    """What a decision depends on, but for what is measured."""
    return {
        "target": str(target),
        "runs": list(manifests),
        "windows": windows_sha256,
        "judged_on": judged_on,
        "by_layers": by_layers,
    }
