"""How close a result is to the limits of its gate: how much of what each allows is used up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.catalog.entries import Gate, TextLimits
from pipeline.evaluation.answers import TaskFidelity
from pipeline.fidelity import Fidelity, TextFidelity


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """One figure beside its limit.

    Attributes:
        figure: its name, after the set or task that it is of.
        used: the loss over the loss that is allowed: above 1 the limit is exceeded.
    """

    figure: str
    used: float


def closest(gate: Gate | None, fidelity: Fidelity | None) -> Closeness | None:
    """The figure that uses most of what its limit allows; None without limits, or figures."""
    if gate is None or fidelity is None:
        return None
    if fidelity.not_finite is not None:
        return Closeness(figure="not finite", used=math.inf)
    found = [
        closeness
        for name, of_texts in fidelity.texts.items()
        for closeness in _of_texts(gate.of_set(name), name, of_texts)
    ]
    found += [closeness for task in fidelity.tasks for closeness in _of_task(gate, task)]
    return max(found, key=lambda one: one.used, default=None)


def _of_texts(limits: TextLimits, name: str, found: TextFidelity) -> Iterator[Closeness]:
    ratio = found.perplexity_ratio
    rows = (
        ("perplexity", None if ratio is None else ratio - 1, limits.max_perplexity_increase),
        ("divergence", found.divergence, limits.max_divergence),
        ("divergence p99", found.divergence_p99, limits.max_divergence_p99),
        ("agreement", _loss(found.agreement), _loss(limits.min_agreement)),
        ("cosine", _loss(found.cosine), _loss(limits.min_cosine)),
    )
    for figure, lost, allowed in rows:
        if allowed is not None:
            yield Closeness(figure=f"{name} {figure}".strip(), used=_used(lost, allowed))


def _of_task(gate: Gate, task: TaskFidelity) -> Iterator[Closeness]:
    rows = (
        ("recovery", _loss(task.recovery), _loss(gate.min_recovery)),
        ("flips", task.flips / task.num_questions, gate.max_flips),
    )
    for figure, lost, allowed in rows:
        if allowed is not None:
            yield Closeness(figure=f"{task.name} {figure}", used=_used(lost, allowed))


def _loss(share: float | None) -> float | None:
    """What is missing from one."""
    return None if share is None else 1 - share


def _used(lost: float | None, allowed: float) -> float:
    if lost is None or math.isnan(lost):  # it was not measured, and so fails its limit
        return math.inf
    if lost <= 0:  # nothing was lost; a limit may ask for more than the source has
        return 0.0 if lost <= allowed else math.inf
    return lost / allowed if allowed > 0 else math.inf
