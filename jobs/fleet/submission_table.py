"""How a submission stands: a live table on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.fleet.submission import Phase, Task
from jobs.log_lines import Level, tell

_LEVELS: dict[Phase, Level] = {"gate failed": "warning", "failed": "error"}
Tell = Callable[[Sequence[Task]], None]


@contextlib.contextmanager
def watch_tasks(console: Console) -> Iterator[Tell]:
    """Yield what a submission is to tell how it stands."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda tasks: live.update(tasks_table(tasks), refresh=True)
        return
    told: dict[str, tuple[str, str]] = {}

    def changes(tasks: Sequence[Task]) -> None:
        for task in tasks:
            state = (task.phase, task.job)
            if told.get(task.request.request_id) != state:
                told[task.request.request_id] = state
                more = f": {task.text}" if task.text else ""
                tell(
                    console,
                    task.phase,
                    f"{task.name}: {task.phase} {task.job}{more}",
                    level=_LEVELS.get(task.phase, "info"),
                    run=task.request.run_id,
                    model=task.request.model,
                    recipe=task.request.recipe_name,
                    job=task.job,
                )

    yield changes


def tasks_table(tasks: Sequence[Task]) -> Table:
    """A line for each request."""
    table = Table("run", "state", "job", "attempts", "")
    for task in tasks:
        table.add_row(
            Text(task.name), task.phase, Text(task.job), str(task.started), Text(task.text)
        )
    return table


def tasks_json(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Plain JSON values."""
    return [
        {
            "model": task.request.model,
            "recipe": task.request.recipe_name,
            "request_id": task.request.request_id,
            "run_id": task.request.run_id,
            "state": task.phase,
            "job": task.job,
            "attempts": task.started,
            "failed": list(task.failed),
            "text": task.text,
        }
        for task in tasks
    ]
