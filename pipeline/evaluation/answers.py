"""How well source and result answer a task, from the log-likelihoods of its choices.

As in EleutherAI's lm-evaluation-harness: `acc` takes the choice of the greatest log-likelihood,
`acc_norm` that of the greatest log-likelihood per character, and a standard error is that of a mean
over a sample, √(p(1 - p)/(n - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.choices import TaskRows


@dataclass(frozen=True, kw_only=True)
class ChoiceLikelihood:
    """One choice: Σ log p(token) over its tokens, natural, given all before them.

    Attributes:
        source_broken_at, result_broken_at: where values first are not finite; "" if all are.
    """

    source: float
    result: float
    source_broken_at: str = ""
    result_broken_at: str = ""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One model's share of right answers; a standard error of a single question is None."""

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None

    @classmethod
    def of(cls, right: NDArray[np.bool_], right_norm: NDArray[np.bool_]) -> Accuracy:
        """Args: right, right_norm: [questions]."""
        acc, acc_norm = float(right.mean()), float(right_norm.mean())
        return cls(
            acc=acc,
            acc_stderr=_stderr(acc, len(right)),
            acc_norm=acc_norm,
            acc_norm_stderr=_stderr(acc_norm, len(right)),
        )


def _stderr(share: float, number: int) -> float | None:
    return math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else None


@dataclass(frozen=True, kw_only=True)
class TaskFidelity:
    """A result beside its source on one task.

    Attributes:
        truncated: choices that lost tokens on the left, as too long for the model.
        flips: questions that one of the two answers rightly and the other does not, by `acc`.
        changed: questions to which the two give other answers, by `acc`: flips, and wrong answers
            in place of other wrong ones.
        recovery: the result's `acc` over the source's; None where the source has none right.
        divergence: mean KL(source ‖ result) of the distributions over a question's choices, nats.
    """

    name: str
    num_questions: int
    truncated: int
    source: Accuracy
    result: Accuracy
    flips: int
    changed: int
    recovery: float | None
    divergence: float

    @classmethod
    def of(cls, rows: TaskRows, choices: Sequence[ChoiceLikelihood]) -> TaskFidelity:
        """The figures of a task.

        Args:
            choices: of each of the rows.
        """
        bounds = np.cumsum(rows.num_choices)[:-1]
        log_p, log_q = (
            np.split(np.array([getattr(choice, of) for choice in choices]), bounds)
            for of in ("source", "result")
        )
        characters = np.split(rows.characters, bounds)
        answers_p, answers_q = (_greatest(values) for values in (log_p, log_q))
        rights = [found == rows.answers for found in (answers_p, answers_q)]
        rights_norm = [
            _greatest([v / n for v, n in zip(values, characters, strict=True)]) == rows.answers
            for values in (log_p, log_q)
        ]
        source, result = map(Accuracy.of, rights, rights_norm)
        divergences = [_divergence(p, q) for p, q in zip(log_p, log_q, strict=True)]
        return cls(
            name=rows.name,
            num_questions=len(rows.answers),
            truncated=rows.truncated,
            source=source,
            result=result,
            flips=int((rights[0] != rights[1]).sum()),
            changed=int((answers_p != answers_q).sum()),
            recovery=result.acc / source.acc if source.acc else None,
            divergence=math.fsum(divergences) / len(divergences),
        )

    @classmethod
    def from_figures(cls, figures: dict[str, Any]) -> TaskFidelity:
        """The inverse of `dataclasses.asdict`; null stands for NaN."""
        models = {name: Accuracy(**figures[name]) for name in ("source", "result")}
        divergence = figures["divergence"]
        values = figures | models | {"divergence": math.nan if divergence is None else divergence}
        return cls(**values)


def _greatest(values: Sequence[NDArray[np.float64]]) -> NDArray[np.int64]:
    """Each question's choice; -1, which is never right, where a likelihood is not a number."""
    return np.array([-1 if np.isnan(one).any() else int(np.argmax(one)) for one in values])


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore"):
        log_p, log_q = (one - np.logaddexp.reduce(one) for one in (log_p, log_q))
        return float(np.sum(np.exp(log_p) * (log_p - log_q)))
