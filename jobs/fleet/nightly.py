"""`quantfleet run` and `nightly`: decide what is stale, do it once, say what became of it.

A result's quality in a few words, for tables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from jobs.catalog.request import save_request
from jobs.fleet.fulfil import Fulfilled
from jobs.fleet.staleness import Decision
from jobs.logging import is_json, log_event, set_run
from jobs.quantities import size
from pipeline.errors import LeaseHeldError, PipelineError
from pipeline.storage.object_store import ObjectStore
from quantizer.errors import QuantizationError

Result = Literal[
    "up to date", "published", "gate failed", "failed", "elsewhere", "set aside", "to do"
]

_GATE_FAILED = 5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run in a pass.

    Attributes:
        result: "elsewhere" is left to another driver; "to do" is what a dry run would do.
        text: more, in words.
        exit_code: 0 where what is wanted is published, or somebody sees to it.
    """

    decision: Decision
    result: Result
    text: str = ""
    exit_code: int = 0
    quality: dict[str, Any] | None = None
    solved: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        wanted = self.decision.wanted
        request = wanted.request
        return {
            "model": wanted.entry.name,
            "recipe": wanted.recipe.name,
            "request_id": None if request is None else request.request_id,
            "run_id": None if request is None else request.run_id,
            "state": self.decision.state,
            "reasons": list(self.decision.reasons),
            "bytes_read": self.decision.bytes_read,
            "result": self.result,
            "solved": self.solved,
            "quality": self.quality,
            "text": self.text,
        }


def preview(decisions: Sequence[Decision]) -> tuple[Outcome, ...]:
    """What a pass would do."""
    return tuple(
        Outcome(decision=decision, result="to do")
        if decision.state == "stale"
        else _left_alone(decision)
        for decision in decisions
    )


def one_pass(
    root: ObjectStore,
    decisions: Sequence[Decision],
    carry: Callable[[Decision], Fulfilled],
) -> Iterator[Outcome]:
    """Do what is stale, one after the other; what fails does not keep the rest from being done.

    Args:
        carry: fulfils one decision's request.
    """
    for decision in decisions:
        if decision.state != "stale":
            left_alone = _left_alone(decision)
            log_outcome(left_alone)
            yield left_alone
            continue
        request = decision.request
        set_run(run=request.run_id, model=request.model, recipe=request.recipe_name)
        why = "; ".join(decision.reasons)
        log_event("stale", f"{decision.wanted.name}: {why}", {"reasons": list(decision.reasons)})
        save_request(root, request)
        outcome = _done(decision, carry)
        log_outcome(outcome)
        set_run()
        yield outcome


def log_outcome(outcome: Outcome) -> None:
    """Log an outcome for machines as soon as it is known; people get a table at the end."""
    if is_json():
        level = logging.INFO
        if outcome.exit_code:
            level = logging.WARNING if outcome.result == "gate failed" else logging.ERROR
        values = outcome.to_dict()
        log_event(outcome.result, values.pop("text"), values, level=level)


def _done(decision: Decision, carry: Callable[[Decision], Fulfilled]) -> Outcome:
    try:
        fulfilled = carry(decision)
    except LeaseHeldError as held:
        return Outcome(decision=decision, result="elsewhere", text=str(held))
    except (PipelineError, QuantizationError) as error:
        code = error.exit_code if isinstance(error, PipelineError) else 2
        return Outcome(decision=decision, result="failed", text=str(error), exit_code=code)
    verdict = fulfilled.verdict
    return Outcome(
        decision=decision,
        result="published" if verdict.passed else "gate failed",
        text="; ".join(verdict.failures),
        exit_code=0 if verdict.passed else _GATE_FAILED,
        quality=verdict.quality,
        solved=fulfilled.solved,
    )


def _left_alone(decision: Decision) -> Outcome:
    text = "; ".join(decision.reasons)
    match decision.state:
        case "fresh":
            assert decision.current is not None
            quality = decision.current.release.quality
            return Outcome(decision=decision, result="up to date", quality=quality)
        case "gate failed":
            verdict = decision.verdict
            return Outcome(
                decision=decision,
                result="gate failed",
                text=text,
                exit_code=_GATE_FAILED,
                quality=None if verdict is None else verdict.quality,
            )
        case "set aside":
            return Outcome(decision=decision, result="set aside", text=text)
    problem = decision.wanted.problem
    code = 3 if problem is None else problem.exit_code
    return Outcome(decision=decision, result="failed", text=text, exit_code=code)


def exit_code_of(outcomes: Sequence[Outcome]) -> int:
    """Of the whole pass: that of the first failure, else 5 where a gate was not passed, else 0."""
    codes = [outcome.exit_code for outcome in outcomes if outcome.exit_code]
    return next((code for code in codes if code != _GATE_FAILED), codes[0] if codes else 0)


def pass_table(outcomes: Sequence[Outcome]) -> Table:
    """What became of each run, and what finding that out cost."""
    table = Table("model", "recipe", "result", "why", "read to decide", "quality")
    for outcome in outcomes:
        decision = outcome.decision
        why = outcome.text or "; ".join(decision.reasons)
        table.add_row(
            decision.wanted.entry.name,
            decision.wanted.recipe.name,
            outcome.result,
            Text(why),
            size(decision.bytes_read),
            quality_text(outcome.quality),
        )
    return table


def quality_text(quality: Mapping[str, Any] | None) -> str:
    """See `jobs.publish.verdict.figures`; a dash where nothing was measured."""
    if quality is None:
        return "–"
    before, after = quality["source_perplexity"], quality["result_perplexity"]
    if before is not None and after is not None:
        return f"perplexity {before:.4g} → {after:.4g}"
    if quality["cosine"] is not None:
        return f"cosine {quality['cosine']:.5f}"
    return "no number"
