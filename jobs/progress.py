"""How a run tells a person where it stands: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.plan import Plan
from pipeline.run import Report, Step


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
                _say(f"{step.event}: {step.text}", progress.console)

        yield report


def _line(plan: Plan, step: Step, console: Console) -> None:
    if step.event == "committed" and step.part is not None:
        assert step.record is not None
        # Of parts that were solved side by side, the first reports the seconds of all.
        stages = "".join(f", {name} {value:.1f}s" for name, value in step.seconds.items())
        _say(
            f"committed {step.part + 1}/{len(plan.parts)} {plan.parts[step.part].name}: "
            f"{step.record.size_bytes:,} bytes{stages}",
            console,
        )
    elif step.text:
        _say(f"{step.event}: {step.text}", console)


def _say(line: str, console: Console) -> None:
    """As it is: in one line, and square brackets are no markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
