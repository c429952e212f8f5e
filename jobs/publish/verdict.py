"""The verdict on a result: whether it is good enough to be published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.catalog.entries import Gate, TextLimits
from jobs.catalog.request import checked_id
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.evaluation.answers import TaskFidelity
from pipeline.evaluation.named_texts import unknown_name
from pipeline.fidelity import Fidelity, TextFidelity
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord


@dataclass(frozen=True, kw_only=True)
class JudgedRun(StoredRecord):
    """What was made for a request, and how good it is.

    Attributes:
        manifest_sha256: of the manifest that names the artifact's files with their digests.
        source_bytes, stored_bytes: size of the weights, before and after.
        quality: what `quality_figures` returns.
        gate: its limits.
    """

    request_id: str
    model: str
    recipe_name: str
    run_id: str
    plan_digest: str
    manifest_sha256: str
    source_bytes: int
    stored_bytes: int
    quality: dict[str, Any] | None
    gate: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Verdict(JudgedRun):
    """The verdict on one request's result; it is kept whether or not the result is published.

    Its bytes do not depend on when or where it was reached.
    """

    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


_PREFIX = "verdicts/"


def verdict_key(request_id: str) -> str:
    """Where a request's verdict lies, below a catalog's root."""
    return f"{_PREFIX}{checked_id(request_id)}.json"


def judged_requests(root: ObjectStore, model: str, recipe_name: str) -> tuple[str, ...]:
    """The ids of all requests for a model and recipe on which there are verdicts."""
    pattern = re.compile(rf"{re.escape(f'{model}-{recipe_name}')}-[0-9a-f]{{12}}")
    found = (key.removeprefix(_PREFIX).removesuffix(".json") for key in root.list(_PREFIX))
    return tuple(request_id for request_id in found if pattern.fullmatch(request_id))


def save_verdict(root: ObjectStore, verdict: Verdict) -> None:
    """Write a verdict, over an earlier one."""
    root.put(verdict_key(verdict.request_id), verdict.to_json())


def find_verdict(root: ObjectStore, request_id: str) -> Verdict | None:
    """The verdict on a request; None if there is none, or it is damaged."""
    try:
        return Verdict.read(root, verdict_key(request_id))
    except (MissingObjectError, DamagedObjectError):
        return None


def failures(gate: Gate | None, fidelity: Fidelity | None) -> tuple[str, ...]:
    """The limits that a result exceeds, in words; none if it may be published.

    A figure that is not measured for this type of model, or is NaN, fails its limit. A result whose
    values are not finite fails without any.
    """
    if fidelity is not None and fidelity.not_finite is not None:
        return (fidelity.not_finite,)
    return () if gate is None else tuple(_failures(gate, fidelity))


def _failures(gate: Gate, fidelity: Fidelity | None) -> Iterator[str]:
    if fidelity is None:
        yield f"it was not evaluated; give {' and '.join(sorted(gate.judges))}"
        return
    for name, of_texts in fidelity.texts.items():
        for failure in _failures_on_texts(gate.of_set(name), of_texts):
            yield f"{name}: {failure}" if name else failure
    if not fidelity.texts and "evaluate_on" in gate.judges:
        yield "it was not evaluated on texts; give evaluate_on"
    for name in sorted(set(gate.sets) - set(fidelity.texts)):
        yield unknown_name(name, {one.name for one in fidelity.sets})
    if "tasks" in gate.judges and not fidelity.tasks:
        yield "it was given no tasks; give tasks"
    for task in fidelity.tasks:
        yield from _failures_on_task(gate, task)


def _failures_on_texts(gate: TextLimits, fidelity: TextFidelity) -> Iterator[str]:
    if gate.max_perplexity_increase is not None:
        before, after = fidelity.source_perplexity, fidelity.result_perplexity
        if before is None or after is None:
            yield _absent("perplexity", "max_perplexity_increase", "min_cosine")
        elif not after <= before * (1 + gate.max_perplexity_increase):
            yield (
                f"perplexity {before:.4g} → {after:.4g}, {after / before - 1:+.2%}, more than "
                f"{gate.max_perplexity_increase:+.2%}"
            )
    if gate.max_divergence is not None:
        if fidelity.divergence is None:
            yield _absent("divergence", "max_divergence", "min_cosine")
        elif not fidelity.divergence <= gate.max_divergence:
            yield f"divergence {fidelity.divergence:.4g} nats, more than {gate.max_divergence:.4g}"
    if gate.max_divergence_p99 is not None:
        if fidelity.divergence_p99 is None:
            yield _absent("divergence", "max_divergence_p99", "min_cosine")
        elif not fidelity.divergence_p99 <= gate.max_divergence_p99:
            yield (
                f"divergence {fidelity.divergence_p99:.4g} nats at the 99th percentile, more than "
                f"{gate.max_divergence_p99:.4g}"
            )
    if gate.min_agreement is not None:
        if fidelity.agreement is None:
            yield _absent("agreement", "min_agreement", "min_cosine")
        elif not fidelity.agreement >= gate.min_agreement:
            yield (
                f"same next token {fidelity.agreement:.2%}, less often than "
                f"{gate.min_agreement:.2%}"
            )
    if gate.min_cosine is not None:
        if fidelity.cosine is None:
            yield _absent("cosine", "min_cosine", "max_perplexity_increase or max_divergence")
        elif not fidelity.cosine >= gate.min_cosine:
            yield f"cosine {fidelity.cosine:.5f}, less than {gate.min_cosine:.5f}"


def _failures_on_task(gate: Gate, task: TaskFidelity) -> Iterator[str]:
    found = f"task {task.name}: accuracy {task.source.acc:.4g} → {task.result.acc:.4g}"
    if gate.min_recovery is not None:
        if task.recovery is None:
            yield (
                f"task {task.name}: the source has no answer right, so that its recovery cannot be "
                "measured; give other tasks, or remove min_recovery"
            )
        elif not task.recovery >= gate.min_recovery:
            yield (
                f"{found}, of {task.num_questions} questions: recovery {task.recovery:.4g}, less "
                f"than {gate.min_recovery:.4g}"
            )
    share = task.flips / task.num_questions
    if gate.max_flips is not None and not share <= gate.max_flips:
        yield (
            f"{found}, with {task.flips} of {task.num_questions} answers flipped between right and "
            f"wrong: {share:.2%}, more than {gate.max_flips:.2%}"
        )


def _absent(figure: str, limit: str, instead: str) -> str:
    return f"no {figure} is measured of a model of this kind; replace {limit} by {instead}"


def quality_figures(fidelity: Fidelity | None) -> dict[str, Any] | None:
    """A result's quality as plain JSON values; None if it was not evaluated."""
    return None if fidelity is None else fidelity.figures()


def quality_text(quality: Mapping[str, Any] | None, between: str = ", ") -> str:
    """What `quality_figures` returns, in a few words.

    Args:
        between: sets of texts and tasks.
    """
    if quality is None:
        return "–"
    if quality.get("not_finite") is not None:
        return "not finite"
    tasks = [
        f"{task['name']} {task['source']['acc']:.4g} → {task['result']['acc']:.4g}"
        for task in quality.get("tasks", ())
    ]
    on_texts = [_text_quality(quality)] if quality["num_windows"] else []
    sets = [f"{one['name']} {_text_quality(one)}" for one in quality.get("sets", ())]
    return between.join([*on_texts, *sets, *tasks])


def _text_quality(quality: Mapping[str, Any]) -> str:
    before, after = quality["source_perplexity"], quality["result_perplexity"]
    if before is not None and after is not None:
        return f"perplexity {before:.4g} → {after:.4g}"
    if quality["cosine"] is not None:
        return f"cosine {quality['cosine']:.5f}"
    return "not a number"
