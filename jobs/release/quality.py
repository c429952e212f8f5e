"""A result's evaluations as rows for people, and as eval.json for machines.

What was measured is read as it was stored, so figures that a later version adds show up too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.release.contents import Contents, FinishedRun
from pipeline.canonical import canonical_json
from pipeline.run.evaluations import Evaluation

EVAL_VERSION = 1
"""Of the form of eval.json; a key may be added without raising it."""

_LABELS = {
    "perplexity": "perplexity",
    "divergence": "KL divergence, mean, nats a token",
    "divergence_p99": "KL divergence, 99th percentile, nats a token",
    "agreement": "same most likely token",
    "cosine": "cosine of outputs, mean",
}
# Of a task, in the order in which people ask.
_LABELS_OF_TASKS = {
    "source": "",  # a row for each figure in it
    "flips": "answers that became right or wrong",
    "changed": "answers that changed",
    "divergence": "KL divergence over the choices, mean, nats a question",
    "num_questions": "questions",
    "truncated": "choices that were too long, and cut on the left",
}
_MEASURED_ON = {
    "texts_sha256": "SHA-256 of the texts",
    "tokens_sha256": "of their token windows",
    "tasks": "SHA-256 of the questions",
    "num_windows": "windows",
    "sequence_length": "tokens in each",
    "count": "predicted tokens, or vectors, compared",
}
_PERCENT = frozenset({"agreement", "flips", "accuracy", "acc", "acc_norm"})
# Of what it was measured on, said in words, or a column.
_NOT_ROWS = frozenset({"num_windows", "count", "not_finite", "recovery"})
_BETTER_LOWER = ("perplexity", "loss")


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One figure of an evaluation, as text; "–" where there is none."""

    figure: str
    source: str
    result: str
    recovery: str


def quality_rows(evaluation: Evaluation) -> tuple[QualityRow, ...]:
    """A row for each figure: of both models where both were measured, else of the result alone."""
    return tuple(_rows(_ordered(evaluation.figures, _LABELS), "", _LABELS))


def _ordered(figures: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Figures in the order of their labels; those without one last, by name, as they are stored."""
    known = {name: place for place, name in enumerate(labels)}

    def order(figure: tuple[str, Any]) -> int:
        return known.get(figure[0].removeprefix("source_"), len(known))

    return dict(sorted(figures.items(), key=order))


def measured_on(evaluation: Evaluation) -> tuple[tuple[str, Any], ...]:
    """What an evaluation was measured on: pairs of a label and a value."""
    count = evaluation.figures.get("count")
    given = evaluation.measured_on | ({"count": count} if count else {})
    return tuple(_flat(given, ""))


def _flat(values: Any, inside: str) -> Iterator[tuple[str, Any]]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for name, value in pairs:
        label = f"{inside}{_MEASURED_ON.get(str(name), str(name).replace('_', ' '))}"
        if name == "sets" and not inside:
            yield from _flat(value, inside)  # each under its own name, as its figures are
        elif isinstance(value, Mapping | list | tuple):
            yield from _flat(value, f"{label}: ")
        else:
            yield label, value


def _rows(
    figures: Mapping[str, Any], inside: str, labels: Mapping[str, str]
) -> Iterator[QualityRow]:
    for name, value in figures.items():
        if name.startswith("result") or name in _NOT_ROWS:
            continue  # beside its source, or said elsewhere
        beside = figures.get("result")
        if name == "source" and isinstance(value, Mapping) and isinstance(beside, Mapping):
            for figure in value:
                label = f"{inside}{figure.replace('_', ' ')}"
                yield from _pair(label, figure, value[figure], beside.get(figure))
            continue
        plain = name.removeprefix("source_")
        label = f"{inside}{labels.get(plain, plain.replace('_', ' '))}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}: ", labels)
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                if isinstance(item, Mapping):
                    named = {key: v for key, v in item.items() if key != "name"}
                    given = _LABELS_OF_TASKS if name == "tasks" else _LABELS
                    where = f"{item.get('name', f'{label} {number}')}: "
                    yield from _rows(_ordered(named, given), where, given)
        elif plain != name and f"result_{plain}" in figures:
            yield from _pair(label, plain, value, figures[f"result_{plain}"])
        elif _is_number(value):
            yield QualityRow(figure=label, source="–", result=_shown(plain, value), recovery="–")


def _pair(label: str, name: str, source: Any, result: Any) -> Iterator[QualityRow]:
    if source is None and result is None:
        return  # not measured of a model of this kind
    recovery = "–"
    if _is_number(source) and _is_number(result) and "stderr" not in name:
        lower = any(word in name for word in _BETTER_LOWER)
        top, bottom = (source, result) if lower else (result, source)
        recovery = f"{top / bottom:.1%}" if bottom else "–"
    yield QualityRow(
        figure=label, source=_shown(name, source), result=_shown(name, result), recovery=recovery
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(name: str, value: Any) -> str:
    if not _is_number(value):
        return "not finite" if value is None else str(value)
    if isinstance(value, float) and name in _PERCENT and 0 <= value <= 1:
        return f"{value:.2%}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def sizes(contents: Contents) -> dict[str, int]:
    """Bytes of the weights, before and after."""
    run = contents.run
    found = {"source_bytes": run.source_bytes, "stored_bytes": contents.stored_bytes}
    if contents.export is None and run.loaded_bytes is not None:
        found["loaded_bytes"] = run.loaded_bytes
    return found


def eval_json(contents: Contents) -> bytes:
    """The content of eval.json: what was measured, on what, of which files."""
    run = contents.run
    values = {
        "version": EVAL_VERSION,
        "source": {"name": run.origin.name, "digest": _source_digest(run)},
        "recipe": run.recipe.name,
        "form": contents.form,
        "digests": {
            "manifest_sha256": run.manifest.record_sha256,
            "plan_digest": run.manifest.plan_digest,
            **({} if contents.export is None else {"export_sha256": contents.digest}),
        },
        "sizes": sizes(contents),
        "evaluations": [
            {"measured_on": one.measured_on, "figures": one.figures} for one in run.evaluations
        ],
    }
    return canonical_json(values)


def _source_digest(run: FinishedRun) -> str:
    if run.plan is None:
        digest: str = run.manifest.provenance["source_sha256"]
        return digest
    return run.plan.source_digest
