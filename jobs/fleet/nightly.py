"""`quantfleet run` and `nightly`: make what is stale, one run after another."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from jobs.catalog.catalog_runs import run_name
from jobs.catalog.request import Request, save_request
from jobs.execute import OpenCompute
from jobs.fleet.composition_checks import impossible_compositions
from jobs.fleet.forecast import Forecast, forecasts
from jobs.fleet.fulfil import Fulfilled, GateFailedError
from jobs.fleet.nights import NightEntry
from jobs.fleet.staleness import Decision, Freshness
from jobs.logging import MOST_ROWS, is_json, log_event, set_run, status
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one run: a few words and numbers, since a catalog may have ten thousand.

    Attributes:
        priority: of its entry in the catalog.
        request_id, run_id: None where its files cannot be fingerprinted.
        state, reasons, bytes_read: as it was decided.
        text: more, in words.
        exit_code: 0 if what the catalog asks for is published, or another process is making it.
        seconds: that it took, if it was made.
        driven_seconds: of these, from its claim to its manifest.
        forecast: of what is to do, in a dry run.
        givers: names of the runs that a composition takes blocks of.
    """

    model: str
    recipe: str
    priority: int = 0
    request_id: str | None
    run_id: str | None
    state: Freshness
    reasons: tuple[str, ...] = ()
    bytes_read: int = 0
    result: Result
    text: str = ""
    exit_code: int = 0
    quality: dict[str, Any] | None = None
    solved: bool = False
    seconds: float | None = None
    driven_seconds: float | None = None
    forecast: Forecast | None = None
    givers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return run_name(self.model, self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "request_id": self.request_id,
            "run_id": self.run_id,
            "state": self.state,
            "reasons": list(self.reasons),
            "bytes_read": self.bytes_read,
            "result": self.result,
            "solved": self.solved,
            "quality": self.quality,
            "text": self.text,
            **({} if self.forecast is None else self.forecast.to_dict()),
        }


@dataclass(frozen=True)
class Survey:
    """What a pass over a catalog begins with.

    Attributes:
        outcomes: what is known of every run before anything is made.
        stale: by their places among these, the runs that are to be made, with all that this takes.
    """

    outcomes: list[Outcome]
    stale: dict[int, Decision]

    @classmethod
    def of(cls, decisions: Iterable[Decision]) -> Survey:
        """Take in decisions as they are made; of a run that is not stale its outcome is kept."""
        survey = cls([], {})
        for place, decision in enumerate(decisions):
            if decision.state == "stale":
                survey.stale[place] = decision
            survey.outcomes.append(_preview(decision))
        return survey

    @property
    def others(self) -> list[Outcome]:
        """Of the runs that are not to be made."""
        return [outcome for outcome in self.outcomes if outcome.result != "to do"]


def _preview(decision: Decision) -> Outcome:
    """What is known of a run before anything is made."""
    run, request, reasons = decision.run, decision.run.request, decision.reasons
    known = partial(
        Outcome,
        model=run.entry.name,
        recipe=run.recipe.name,
        priority=run.entry.settings.priority,
        request_id=None if request is None else request.request_id,
        run_id=None if request is None else request.run_id,
        state=decision.state,
        reasons=reasons,
        bytes_read=decision.bytes_read,
        quality=decision.quality,
        givers=run.giver_names,
    )
    text = "; ".join(reasons)
    match decision.state:
        case "stale":
            return known(result="to do")
        case "fresh":
            return known(result="up to date", text=text)
        case "gate failed":
            return known(result="gate failed", text=text, exit_code=GateFailedError.exit_code)
        case "set aside":
            return known(result="set aside", text=text)
        case "unreachable":
            code = 3 if run.problem is None else run.problem.exit_code
            return known(result="failed", text=text, exit_code=code)


def foresee(
    root: ObjectStore,
    survey: Survey,
    open_compute: OpenCompute,
    priced: PricedMachine,
    *,
    in_one_pass: bool = True,
) -> list[Outcome]:
    """What is known of every run, and what those that are to do would take (see `forecasts`)."""
    outcomes = list(survey.outcomes)
    found = forecasts(root, survey.stale, open_compute, priced, in_one_pass=in_one_pass)
    for place, foreseen in found.items():
        match foreseen:
            case Forecast():
                change: dict[str, Any] = {"forecast": foreseen}
            case PipelineError() | QuantizationError():
                change = _failure(foreseen)
        outcomes[place] = dataclasses.replace(outcomes[place], **change)
    return outcomes


def _failure(error: PipelineError | QuantizationError) -> dict[str, Any]:
    """What an outcome is by it."""
    code = error.exit_code if isinstance(error, PipelineError) else PipelineError.exit_code
    return {"result": "failed", "text": str(error), "exit_code": code}


def refuse_impossible(root: ObjectStore, survey: Survey) -> None:
    """Take compositions that could not be made out of what is to be made, and say so at once."""
    with status("checking compositions"):
        found = impossible_compositions(root, survey.stale)
    for place, error in found.items():
        del survey.stale[place]
        refused = dataclasses.replace(survey.outcomes[place], **_failure(error))
        survey.outcomes[place] = refused
        log_event("refused", f"{refused.name}: {refused.text}", level=logging.ERROR)


def run_stale(
    root: ObjectStore, survey: Survey, fulfil: Callable[[Request], Fulfilled]
) -> Iterator[Outcome]:
    """Make what is stale, one run after another; a failure does not stop the others."""
    became: dict[str, Outcome] = {}
    with watch_catalog([entry_progress(outcome) for outcome in survey.outcomes]) as show:
        for place, outcome in enumerate(survey.outcomes):
            decision = survey.stale.pop(place, None)
            if decision is not None:
                held_up = _held_up(outcome, [became.get(one) for one in outcome.givers])
                outcome = held_up or _made(root, outcome, decision, fulfil, show)
                became[outcome.name] = outcome
                show(entry_progress(outcome))
            elif outcome.result == "failed":
                became[outcome.name] = outcome
            log_outcome(outcome)
            set_run()
            yield outcome


def _held_up(known: Outcome, givers: Sequence[Outcome | None]) -> Outcome | None:
    """Why a composition is not to be tried; None where all runs that it is made of are done."""
    for giver in givers:
        if giver is not None and giver.result in ("failed", "elsewhere"):
            failed = giver.result == "failed"
            why = "failed" if failed else "is being made by another driver; the next night composes"
            return dataclasses.replace(
                known,
                result=giver.result,
                text=f"not composed, since {giver.name} {why}",
                exit_code=giver.exit_code,
            )
    return None


def entry_progress(outcome: Outcome, *, is_begun: bool = False) -> EntryProgress:
    """How far an entry is, for whoever watches."""
    phase: EntryPhase = "failed" if outcome.exit_code else "done"
    if outcome.result == "to do":
        phase = "running" if is_begun else "waiting"
    return EntryProgress(
        name=outcome.name, priority=outcome.priority, phase=phase, text=outcome.text
    )


def _made(
    root: ObjectStore,
    known: Outcome,
    decision: Decision,
    fulfil: Callable[[Request], Fulfilled],
    show: ShowEntry,
) -> Outcome:
    request, reasons = decision.request, list(decision.reasons)
    set_run(run=request.run_id, model=request.model, recipe=request.recipe_name)
    log_event("stale", f"{known.name}: {'; '.join(reasons)}", {"reasons": reasons})
    show(entry_progress(known, is_begun=True))
    save_request(root, request)
    return _outcome_of_run(known, request, fulfil)


def _outcome_of_run(
    known: Outcome, request: Request, fulfil: Callable[[Request], Fulfilled]
) -> Outcome:
    became = partial(dataclasses.replace, known)
    began = time.monotonic()
    try:
        fulfilled = fulfil(request)
    except LeaseHeldError as held:
        return became(result="elsewhere", text=str(held))
    except (PipelineError, QuantizationError) as error:
        return became(**_failure(error))
    verdict = fulfilled.verdict
    return became(
        result="published" if verdict.passed else "gate failed",
        text="; ".join(verdict.failures) or fulfilled.note,
        exit_code=0 if verdict.passed else GateFailedError.exit_code,
        quality=verdict.quality,
        solved=fulfilled.solved,
        seconds=time.monotonic() - began if fulfilled.solved else None,
        driven_seconds=fulfilled.driven_seconds if fulfilled.solved else None,
    )


def night_entries(outcomes: Iterable[Outcome]) -> Iterator[NightEntry]:
    """What may be remembered of a night."""
    for outcome in outcomes:
        yield NightEntry(
            model=outcome.model,
            recipe=outcome.recipe,
            request_id=outcome.request_id or "",
            result=outcome.result,
            reasons=outcome.reasons,
            text=outcome.text,
            seconds=_rounded(outcome.seconds),
            driven_seconds=_rounded(outcome.driven_seconds),
        )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


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
    """What became of each run, and how much was read to decide that.

    Of very many, only as many are shown as a person reads: those that were up to date go first.
    """
    table = Table("model", "recipe", "result", "why", "read to decide", "quality")
    shown = outcomes
    if len(outcomes) > MOST_ROWS:
        shown = [one for one in outcomes if one.result != "up to date"][:MOST_ROWS]
        left_out = Counter(one.result for one in outcomes) - Counter(one.result for one in shown)
        counts = ", ".join(f"{number} {result}" for result, number in left_out.items())
        table.caption = f"and {counts}; --json has all"
    for outcome in shown:
        table.add_row(
            outcome.model,
            outcome.recipe,
            outcome.result,
            Text(outcome.text or "; ".join(outcome.reasons)),
            size(outcome.bytes_read),
            quality_text(outcome.quality),
        )
    return table
