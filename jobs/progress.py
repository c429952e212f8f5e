"""How a run reports its progress: a bar on a terminal, lines of text or JSON elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from rich import progress

from jobs.logging import STDERR, is_json, log_event
from pipeline.plan import Plan
from pipeline.run.events import Report, Step
from quantizer.schemes import scheme_to_dict

_TROUBLE = frozenset({"damaged", "lost", "fewer"})


@contextlib.contextmanager
def watch(plan: Plan) -> Iterator[Report]:
    """Yield what a run is to report to."""
    if is_json():
        yield lambda step: _log_values(plan, step)
        return
    if not STDERR.is_terminal:
        yield lambda step: log_event(step.event, _message(plan, step))
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=STDERR, transient=True) as shown:
        bar = shown.add_task(plan.model, total=len(plan.parts))
        done: set[int] = set()

        def report(step: Step) -> None:
            if step.event == "resumed":
                done.update(step.parts)
            if step.event == "committed" and step.part is not None:
                done.add(step.part)
                shown.update(bar, description=plan.parts[step.part].name)
            shown.update(bar, completed=len(done))
            if step.text:
                log_event(step.event, f"{step.event}: {step.text}")

        yield report


def _message(plan: Plan, step: Step) -> str:
    if step.record is not None and step.part is not None:
        # Of parts solved side by side, the first reports the seconds of all.
        stages = "".join(f", {name} {value:.1f}s" for name, value in step.seconds.items())
        return (
            f"committed {step.part + 1}/{len(plan.parts)} {plan.parts[step.part].name}: "
            f"{step.record.size_bytes:,} bytes{stages}"
        )
    return f"{step.event}: {step.text}" if step.text else ""


def _log_values(plan: Plan, step: Step) -> None:
    """Also what people do not see: each layer's report, and steps without words."""
    about: dict[str, object] = {"parts": len(plan.parts)}
    if step.part is not None:
        about |= {"part": step.part, "block": plan.parts[step.part].name}
    for layer in () if step.record is None else step.record.layers:
        scheme = None if layer.scheme is None else scheme_to_dict(layer.scheme)
        fields = {"layer": layer.path, "scheme": scheme, "account": layer.account}
        log_event("layer", layer.note, {**about, **fields})
    if step.record is not None:
        about["size_bytes"] = step.record.size_bytes
    log_event(
        step.event,
        _message(plan, step) or step.event,
        about | {"seconds": {name: round(value, 3) for name, value in step.seconds.items()}},
        level=logging.WARNING if step.event in _TROUBLE else logging.INFO,
    )
