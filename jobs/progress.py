"""How a run tells where it stands: a bar on a terminal, lines elsewhere, of text or JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jobs.logging import JsonConsole, Level, tell
from pipeline.plan import Plan
from pipeline.run.driver import Report, Step

_TROUBLE = frozenset({"damaged", "lost", "fewer"})


@contextlib.contextmanager
def watch(plan: Plan, console: Console) -> Iterator[Report]:
    """Yield what a run is to report to."""
    if not console.is_terminal:
        yield lambda step: _line(plan, step, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(plan.model, total=len(plan.parts))
        done: set[int] = set()

        def report(step: Step) -> None:
            if step.event == "resumed":
                done.update(step.parts)
            if step.event == "committed" and step.part is not None:
                done.add(step.part)
                progress.update(bar, description=plan.parts[step.part].name)
            progress.update(bar, completed=len(done))
            if step.text:
                tell(progress.console, step.event, f"{step.event}: {step.text}")

        yield report


def _line(plan: Plan, step: Step, console: Console) -> None:
    words = ""
    if step.event == "committed" and step.part is not None:
        assert step.record is not None
        # Of parts that were solved side by side, the first reports the seconds of all.
        stages = "".join(f", {name} {value:.1f}s" for name, value in step.seconds.items())
        words = (
            f"committed {step.part + 1}/{len(plan.parts)} {plan.parts[step.part].name}: "
            f"{step.record.size_bytes:,} bytes{stages}"
        )
    elif step.text:
        words = f"{step.event}: {step.text}"
    if isinstance(console, JsonConsole):
        _objects(plan, step, words, console)
    elif words:
        tell(console, step.event, words)


def _objects(plan: Plan, step: Step, words: str, console: JsonConsole) -> None:
    """Also what people are not told: what each layer came to, and what has no words."""
    about: dict[str, Any] = {"parts": len(plan.parts)}
    if step.part is not None:
        about |= {"part": step.part, "block": plan.parts[step.part].name}
    layers = () if step.record is None else step.record.layers
    for layer in layers:
        about_layer = {**about, "layer": layer.path, "scheme": layer.scheme}
        tell(console, "layer", layer.note, account=layer.account, **about_layer)
    level: Level = "warning" if step.event in _TROUBLE else "info"
    if step.record is not None:
        about["size_bytes"] = step.record.size_bytes
    seconds = {name: round(value, 3) for name, value in step.seconds.items()}
    tell(console, step.event, words or step.event, level=level, **about, seconds=seconds)
