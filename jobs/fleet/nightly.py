"""`quantfleet run` and `nightly`: make what is stale, one run after another."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from jobs.catalog.request import Request, save_request
from jobs.execute import OpenCompute
from jobs.fleet.forecast import Forecast, forecasts
from jobs.fleet.fulfil import Fulfilled, GateFailedError
from jobs.fleet.nights import NightEntry
from jobs.fleet.staleness import Decision
from jobs.logging import is_json, log_event, set_run
from jobs.progress.catalog_view import EntryPhase, EntryProgress, ShowEntry, watch_catalog
from jobs.publish.verdict import quality_text
from jobs.quantities import size
from jobs.run_costs import PricedMachine
from pipeline.errors import LeaseHeldError, PipelineError
from pipeline.storage.object_store import ObjectStore
from quantizer.errors import QuantizationError

Result = Literal[
    "up to date", "published", "gate failed", "failed", "elsewhere", "set aside", "to do"
]
"""Of one run: "elsewhere" is driven by another process; "to do" is what a dry run would make."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run.

    Attributes:
        text: more, in words.
        exit_code: 0 if what the catalog asks for is published, or another process is making it.
        forecast: of what is to do, in a dry run.
    """

    decision: Decision
    result: Result
    text: str = ""
    exit_code: int = 0
    quality: dict[str, Any] | None = None
    solved: bool = False
    forecast: Forecast | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        run = self.decision.run
        request = run.request
        return {
            "model": run.entry.name,
            "recipe": run.recipe.name,
            "request_id": None if request is None else request.request_id,
            "run_id": None if request is None else request.run_id,
            "state": self.decision.state,
            "reasons": list(self.decision.reasons),
            "bytes_read": self.decision.bytes_read,
            "result": self.result,
            "solved": self.solved,
            "quality": self.quality,
            "text": self.text,
            **({} if self.forecast is None else self.forecast.to_dict()),
        }


def preview(decision: Decision) -> Outcome:
    """What is known of a run before anything is made."""
    known = partial(Outcome, decision=decision, text="; ".join(decision.reasons))
    match decision.state:
        case "stale":
            return Outcome(decision=decision, result="to do")
        case "fresh":
            assert decision.current is not None
            return known(result="up to date", quality=decision.current.release.quality)
        case "gate failed":
            quality = None if decision.verdict is None else decision.verdict.quality
            return known(result="gate failed", exit_code=GateFailedError.exit_code, quality=quality)
        case "set aside":
            return known(result="set aside")
        case "unreachable":
            problem = decision.run.problem
            return known(result="failed", exit_code=3 if problem is None else problem.exit_code)


def foresee(
    root: ObjectStore,
    decisions: Sequence[Decision],
    open_compute: OpenCompute,
    priced: PricedMachine,
) -> list[Outcome]:
    """What is known of every run, and what those that are to do would take (see `forecasts`)."""
    found = forecasts(root, decisions, open_compute, priced)
    outcomes = []
    for place, decision in enumerate(decisions):
        outcome, foreseen = preview(decision), found.get(place)
        match foreseen:
            case None:
                pass
            case Forecast():
                outcome = dataclasses.replace(outcome, forecast=foreseen)
            case PipelineError() | QuantizationError():
                code = getattr(foreseen, "exit_code", PipelineError.exit_code)
                outcome = dataclasses.replace(
                    outcome, result="failed", text=str(foreseen), exit_code=code
                )
        outcomes.append(outcome)
    return outcomes


def run_stale(
    root: ObjectStore, decisions: Sequence[Decision], fulfil: Callable[[Request], Fulfilled]
) -> Iterator[Outcome]:
    """Make what is stale, one run after another; a failure does not stop the others."""
    known = [preview(decision) for decision in decisions]
    became: dict[str, Outcome] = {}
    with watch_catalog([entry_progress(outcome) for outcome in known]) as show:
        for outcome in known:
            run = outcome.decision.run
            held_up = None
            if outcome.result == "to do":
                held_up = _held_up(outcome.decision, [became.get(one) for one in run.giver_names])
            if held_up is None:
                became[run.name] = _carried_out(root, outcome, fulfil, show)
            else:
                became[run.name] = held_up
                show(entry_progress(held_up))
                log_outcome(held_up)
            yield became[run.name]


def _held_up(decision: Decision, givers: Sequence[Outcome | None]) -> Outcome | None:
    """Why a composition is not to be tried; None where all runs that it is made of are done."""
    for giver in givers:
        if giver is not None and giver.result in ("failed", "elsewhere"):
            name, failed = giver.decision.run.name, giver.result == "failed"
            why = "failed" if failed else "is being made by another driver; the next night composes"
            return Outcome(
                decision=decision,
                result=giver.result,
                text=f"not composed, since {name} {why}",
                exit_code=giver.exit_code,
            )
    return None


def entry_progress(outcome: Outcome, *, is_begun: bool = False) -> EntryProgress:
    """How far an entry is, for whoever watches."""
    run = outcome.decision.run
    phase: EntryPhase = "failed" if outcome.exit_code else "done"
    if outcome.result == "to do":
        phase = "running" if is_begun else "waiting"
    return EntryProgress(
        name=run.name, priority=run.entry.settings.priority, phase=phase, text=outcome.text
    )


def _carried_out(
    root: ObjectStore, known: Outcome, fulfil: Callable[[Request], Fulfilled], show: ShowEntry
) -> Outcome:
    decision, outcome = known.decision, known
    if known.result == "to do":
        request, reasons = decision.request, list(decision.reasons)
        set_run(run=request.run_id, model=request.model, recipe=request.recipe_name)
        log_event("stale", f"{decision.run.name}: {'; '.join(reasons)}", {"reasons": reasons})
        show(entry_progress(known, is_begun=True))
        save_request(root, request)
        outcome = _outcome_of_run(decision, fulfil)
        show(entry_progress(outcome))
    log_outcome(outcome)
    set_run()
    return outcome


def _outcome_of_run(decision: Decision, fulfil: Callable[[Request], Fulfilled]) -> Outcome:
    became = partial(Outcome, decision=decision)
    try:
        fulfilled = fulfil(decision.request)
    except LeaseHeldError as held:
        return became(result="elsewhere", text=str(held))
    except (PipelineError, QuantizationError) as error:
        code = error.exit_code if isinstance(error, PipelineError) else PipelineError.exit_code
        return became(result="failed", text=str(error), exit_code=code)
    verdict = fulfilled.verdict
    return became(
        result="published" if verdict.passed else "gate failed",
        text="; ".join(verdict.failures) or fulfilled.note,
        exit_code=0 if verdict.passed else GateFailedError.exit_code,
        quality=verdict.quality,
        solved=fulfilled.solved,
    )


def night_entries(outcomes: Sequence[Outcome]) -> list[NightEntry]:
    """What may be remembered of a night."""
    return [
        NightEntry(
            model=outcome.decision.run.entry.name,
            recipe=outcome.decision.run.recipe.name,
            request_id="" if request is None else request.request_id,
            result=outcome.result,
            reasons=outcome.decision.reasons,
            text=outcome.text,
        )
        for outcome in outcomes
        for request in [outcome.decision.run.request]
    ]


def num_by_result(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many entries ended how, also where that is none."""
    found = Counter(outcome.result for outcome in outcomes)
    return {result: found[result] for result in get_args(Result) if result != "to do"}


def log_outcome(outcome: Outcome) -> None:
    """Log an outcome for machines as soon as it is known; people get a table at the end."""
    if is_json():
        level = logging.INFO
        if outcome.exit_code:
            level = logging.WARNING if outcome.result == "gate failed" else logging.ERROR
        values = outcome.to_dict()
        log_event(outcome.result, values.pop("text"), values, level=level)


def exit_code_of(outcomes: Sequence[Outcome]) -> int:
    """That of the first failure, else 5 if a gate failed, else 0."""
    codes = [outcome.exit_code for outcome in outcomes if outcome.exit_code]
    failures = (code for code in codes if code != GateFailedError.exit_code)
    return next(failures, codes[0] if codes else 0)


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """What became of each run, and how much was read to decide that."""
    table = Table("model", "recipe", "result", "why", "read to decide", "quality")
    for outcome in outcomes:
        decision = outcome.decision
        table.add_row(
            decision.run.entry.name,
            decision.run.recipe.name,
            outcome.result,
            Text(outcome.text or "; ".join(decision.reasons)),
            size(decision.bytes_read),
            quality_text(outcome.quality),
        )
    return table
