"""How close the result is to its source: sums over text windows, their means, and tasks.

Causal language models are compared by the perplexity of both, by the divergence
KL(source ‖ result) of their next-token distributions, and by what they answer to multiple-choice
questions; other models by the cosine between their outputs. `pipeline.worker.evaluate` computes
what these figures are made of. Texts may come in named sets, each with figures of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.answers import ChoiceLikelihood, TaskFidelity
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.choices import TaskRows


@dataclass(frozen=True, kw_only=True)
class WindowFidelity:
    """Sums over one window: for a causal model all but the cosine, for an encoder that alone.

    Attributes:
        count: predicted tokens; for an encoder, compared vectors.
        source_loss, result_loss: Σ -log p(next token), natural.
        divergence: Σ KL(source ‖ result), in nats.
        divergences: of each predicted token.
        agreement: tokens for which both models rank the same next token first.
        source_broken_at, result_broken_at: where values first are not finite; "" if all are.
    """

    count: int
    source_loss: float = 0.0
    result_loss: float = 0.0
    divergence: float = 0.0
    cosine: float = 0.0
    agreement: int = 0
    divergences: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32), compare=False, repr=False
    )
    source_broken_at: str = ""
    result_broken_at: str = ""


@dataclass(frozen=True, kw_only=True)
class TextFidelity:
    """Means over windows of text: of a causal model all but the cosine, of an encoder that alone.

    Attributes:
        num_windows, count: of text, and of predicted tokens; for an encoder, of compared vectors.
        divergence: nats per token.
        divergence_p99: the least divergence that 99% of the tokens do not exceed; None in figures
            of older versions.
        agreement: between 0 and 1.
    """

    num_windows: int
    count: int
    source_perplexity: float | None = None
    result_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    divergence_p99: float | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        """The result's over the source's."""
        if self.result_perplexity is None or not self.source_perplexity:
            return None
        return self.result_perplexity / self.source_perplexity


@dataclass(frozen=True, kw_only=True)
class SetFidelity(TextFidelity):
    """The means over a named set of texts."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Fidelity(TextFidelity):
    """What is known of a result: of texts without a name, of named sets, and of tasks.

    Its own means are those of texts without a name; `num_windows` and `count` are 0 where there
    are none.

    Attributes:
        not_finite: where the result gives values that are not finite, in words; None if nowhere.
        sets: by name.
        tasks: in the order in which they were given.
    """

    not_finite: str | None = None
    sets: tuple[SetFidelity, ...] = ()
    tasks: tuple[TaskFidelity, ...] = ()

    @property
    def texts(self) -> dict[str, TextFidelity]:
        """The means of all texts, by the name of their set; those without one, "", first."""
        unnamed: dict[str, TextFidelity] = {"": self} if self.num_windows else {}
        return unnamed | {one.name: one for one in self.sets}

    def figures(self) -> dict[str, Any]:
        """Plain JSON values.

        NaN and infinity become null, since JSON has no way to write them. What older versions do
        not know is left out where there is nothing to say.
        """
        figures: dict[str, Any] = _finite(dataclasses.asdict(self))
        for name in ("not_finite", "divergence_p99"):
            if getattr(self, name) is None:
                del figures[name]
        for name in ("sets", "tasks"):
            if not getattr(self, name):
                del figures[name]
        return figures

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any]) -> Self:
        """What is known of a result from `figures`; null stands for what is not a number."""
        tasks = tuple(map(TaskFidelity.from_figures, figures.get("tasks", ())))
        sets = tuple(SetFidelity(**one) for one in figures.get("sets", ()))
        return cls(**{**figures, "sets": sets, "tasks": tasks})


def _finite(value: Any) -> Any:
    """JSON values without NaN and infinity; lists for tuples, as JSON reads them."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Answered = tuple[TaskRows, Sequence[ChoiceLikelihood]]
"""A task, and the likelihoods of its choices."""


def average(
    windows: Sequence[WindowFidelity],
    answered: Sequence[Answered] = (),
    sets: Mapping[str, Sequence[WindowFidelity]] | None = None,
) -> Fidelity:
    """Means over windows, summed in their order, and the figures of tasks.

    Args:
        windows: of texts without a name.
        sets: windows of named sets.
    """
    named = {name: of_set for name, of_set in (sets or {}).items() if of_set}
    broken = [
        _not_finite(windows, "windows", "window"),
        *(_not_finite(found, f"windows of {name}", "window") for name, found in named.items()),
        *(_not_finite(choices, f"choices of {rows.name}", "choice") for rows, choices in answered),
    ]
    means = _means(windows) if windows else {"num_windows": 0, "count": 0}
    return Fidelity(
        **means,
        not_finite=next(filter(None, broken), None),
        sets=tuple(SetFidelity(name=name, **_means(found)) for name, found in named.items()),
        tasks=tuple(TaskFidelity.of(rows, choices) for rows, choices in answered),
    )


RowFidelity = WindowFidelity | ChoiceLikelihood
"""What was found of a row of a batch."""


def fidelity_of(given: EvaluationSet, found: Sequence[Sequence[RowFidelity]]) -> Fidelity:
    """The figures of everything that was evaluated.

    Args:
        found: of each row of each of the batches, in their order.
    """
    windows = windows_by_set(given, found)
    choices: list[dict[int, ChoiceLikelihood]] = [{} for _ in given.tasks]
    for batch, rows in zip(given.batches, found, strict=True):
        for row, one in zip(batch.rows, rows, strict=True):
            if batch.task is not None and isinstance(one, ChoiceLikelihood):
                choices[batch.task][row] = one
    answered = [
        (task, [by_row[row] for row in range(len(task.rows))])
        for task, by_row in zip(given.tasks, choices, strict=True)
    ]
    return average(windows.pop("", []), answered, windows)


def windows_by_set(
    given: EvaluationSet, found: Sequence[Sequence[RowFidelity]]
) -> dict[str, list[WindowFidelity]]:
    """What was found of the windows of each set, in their order; see `fidelity_of`."""
    windows: dict[str, list[WindowFidelity]] = {}
    for batch, rows in zip(given.batches, found, strict=True):
        for one in rows:
            if isinstance(one, WindowFidelity):
                windows.setdefault(batch.text_set, []).append(one)
    return windows


def _means(windows: Sequence[WindowFidelity]) -> dict[str, Any]:
    """The fields of `TextFidelity`."""
    count = sum(window.count for window in windows)
    found = {"num_windows": len(windows), "count": count}
    if not any(window.source_loss for window in windows):
        return {**found, "cosine": math.fsum(w.cosine for w in windows) / count}
    return {
        **found,
        "source_perplexity": _perplexity(math.fsum(w.source_loss for w in windows) / count),
        "result_perplexity": _perplexity(math.fsum(w.result_loss for w in windows) / count),
        "divergence": math.fsum(w.divergence for w in windows) / count,
        "agreement": sum(w.agreement for w in windows) / count,
        "divergence_p99": _percentile(np.concatenate([w.divergences for w in windows])),
    }


def _percentile(divergences: NDArray[np.float32]) -> float | None:
    """The nearest rank: no value between two that occurred; NaN counts as the greatest."""
    if not len(divergences):
        return None
    rank = math.ceil(0.99 * len(divergences)) - 1
    return float(np.sort(divergences)[rank])


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _not_finite(compared: Sequence[RowFidelity], what: str, one: str) -> str | None:
    broken = [i for i, found in enumerate(compared) if found.result_broken_at]
    if not broken:
        return None
    first = compared[broken[0]]
    words = (
        f"values that are not finite in {len(broken)} of {len(compared)} {what}; in {one} "
        f"{broken[0]} they first appear in {first.result_broken_at}"
    )
    if first.source_broken_at:
        words += f", and in the source in {first.source_broken_at}"
    return words
