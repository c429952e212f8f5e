"""`quantfleet submit`: one Ray Job for each stale run, several at a time, most urgent first.

Ray only says which jobs are alive. Storage decides whether a run is done: the result of a job that
succeeded may be damaged by now, and a job may have been lost after it published.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from jobs.catalog.request import Request, save_request
from jobs.fleet.nightly import Outcome, entry_progress
from jobs.fleet.nights import NightEntry
from jobs.fleet.simulation import to_start
from jobs.fleet.staleness import Decision, decide_run
from jobs.logging import is_live, log_event
from jobs.progress.catalog_view import EntryPhase, EntryProgress, ShowEntry, watch_catalog
from pipeline.errors import PipelineError
from pipeline.executor.ray_jobs import RayJob, RayJobs
from pipeline.storage.object_store import ObjectStore

TaskPhase = Literal["waiting", "running", "published", "gate failed", "failed"]

_ATTEMPT = re.compile(r"(?P<request>.+)-attempt(?P<number>\d{1,9})")
# The exit code for bad input, which another attempt cannot fix.
_BAD_INPUT = PipelineError.exit_code


@dataclass
class Task:
    """One stale run.

    Attributes:
        job: the latest submission id; "" before the first.
        started: how many jobs this submission started for it.
        failed: each failed job, in words.
    """

    decision: Decision
    phase: TaskPhase = "waiting"
    job: str = ""
    started: int = 0
    text: str = ""
    failed: list[str] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.decision.request

    @property
    def name(self) -> str:
        return self.decision.run.name

    @property
    def labels(self) -> dict[str, str]:
        return {
            "model": self.request.model,
            "recipe": self.request.recipe_name,
            "request": self.request.request_id,
            "run": self.request.run_id,
        }

    @property
    def is_over(self) -> bool:
        return self.phase in ("published", "gate failed", "failed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.request.model,
            "recipe": self.request.recipe_name,
            "request_id": self.request.request_id,
            "run_id": self.request.run_id,
            "state": self.phase,
            "job": self.job,
            "attempts": self.started,
            "failed": list(self.failed),
            "text": self.text,
        }


ShowTasks = Callable[[Sequence[Task]], None]


@dataclass(kw_only=True)
class Submission:
    """Requests by priority, and the jobs that fulfil them.

    Attributes:
        decisions: the stale ones are submitted, in this order.
        at_once: jobs alive at the same time.
        attempts: jobs started for one request in this submission.
        poll_seconds: between two polls of the cluster.
        entrypoint: the command on the nodes' PATH, and what precedes it.
    """

    root: ObjectStore
    jobs: RayJobs
    decisions: InitVar[Iterable[Decision]]
    at_once: int = 4
    attempts: int = 3
    poll_seconds: float = 5.0
    entrypoint: str = "quantfleet"
    tasks: list[Task] = field(init=False)

    def __post_init__(self, decisions: Iterable[Decision]) -> None:
        self.tasks = [Task(decision=one) for one in decisions if one.state == "stale"]

    def step(self) -> None:
        """Poll once: attach to living jobs, settle ended ones, start new ones within the limits."""
        known = self.jobs.list()
        attempts = _attempts(known)
        for task in self.tasks:
            if not task.is_over:
                self._update(task, attempts.get(task.request.request_id, {}))
        alive = sum(1 for task in self.tasks if task.phase == "running")
        by_name = {task.name: task for task in self.tasks}
        ready = []
        for task in self.tasks:
            givers = [by_name[one] for one in task.decision.run.giver_names if one in by_name]
            if task.phase == "waiting" and (failed := _failed(givers)):
                task.phase, task.text = "failed", f"not composed, since {failed} failed"
            if task.phase == "waiting" and all(giver.is_over for giver in givers):
                ready.append(task)
        for task in to_start(ready, alive, self.at_once):
            numbers = attempts.get(task.request.request_id, {})
            self._start(task, max(numbers, default=0) + 1)

    def finish(self, show: ShowTasks) -> None:
        """Step until every task is over."""
        while True:
            self.step()
            show(self.tasks)
            if all(task.is_over for task in self.tasks):
                return
            time.sleep(self.poll_seconds)

    def _update(self, task: Task, attempts: Mapping[int, RayJob]) -> None:
        living = [job for job in attempts.values() if job.is_alive]
        if living:
            task.phase, task.job = "running", living[-1].submission_id
            return
        task.phase = "waiting"
        if task.job:
            self._settle(task, attempts)

    def _settle(self, task: Task, attempts: Mapping[int, RayJob]) -> None:
        """Decide from storage what became of a request whose job has ended."""
        now = decide_run(self.root, task.decision.run, save_verified=True)
        if now.state == "fresh":
            task.phase, task.text = "published", f"release {now.release}"
            return
        if now.state == "gate failed":
            task.phase, task.text = "gate failed", "; ".join(now.reasons)
            return
        ended = next((job for job in attempts.values() if job.submission_id == task.job), None)
        if ended is None:
            end = "is unknown to the cluster"
        elif ended.exit_code is None:
            end = f"ended ({ended.status.lower()})"
        else:
            end = f"ended with exit code {ended.exit_code}"
        task.failed.append(f"{task.job} {end}")
        is_bad_input = ended is not None and ended.exit_code == _BAD_INPUT
        if is_bad_input or task.started >= self.attempts:
            task.phase = "failed"
            task.text = f"{task.failed[-1]}, after {task.started} attempt(s); see ray job logs"

    def _start(self, task: Task, number: int) -> None:
        url = save_request(self.root, task.request)
        task.job = f"{task.request.request_id}-attempt{number}"
        task.started += 1
        self.jobs.submit(
            task.job, f"{self.entrypoint} fulfil {shlex.quote(url)} --address auto", task.labels
        )
        task.phase = "running"


def _failed(givers: Sequence[Task]) -> str:
    """The first of the runs that a composition is made of that has failed; "" if none has."""
    return next((giver.name for giver in givers if giver.phase == "failed"), "")


def night_entries_of_tasks(tasks: Sequence[Task]) -> Iterator[NightEntry]:
    """What may be remembered of a night on which jobs did the work: of those that are over."""
    for task in tasks:
        if task.is_over:
            yield NightEntry(
                model=task.request.model,
                recipe=task.request.recipe_name,
                request_id=task.request.request_id,
                result=task.phase,
                reasons=task.decision.reasons,
                text=task.text,
            )


def exit_code_of_tasks(tasks: Sequence[Task]) -> int:
    """3 if a run was given up, else 5 if a gate failed, else 0."""
    phases = {task.phase for task in tasks}
    return 3 if "failed" in phases else 5 if "gate failed" in phases else 0


def _attempts(known: Mapping[str, RayJob]) -> dict[str, dict[int, RayJob]]:
    """Jobs by request and attempt number, in order."""
    found: dict[str, dict[int, RayJob]] = {}
    for submission_id, job in known.items():
        match = _ATTEMPT.fullmatch(submission_id)
        if match:
            found.setdefault(match["request"], {})[int(match["number"])] = job
    return {request: dict(sorted(numbers.items())) for request, numbers in found.items()}


def stop_jobs(jobs: RayJobs, name: str) -> tuple[str, ...]:
    """Stop the living jobs of a request, or one job by its submission id; returns their ids."""
    stopped = []
    for submission_id, job in sorted(jobs.list().items()):
        match = _ATTEMPT.fullmatch(submission_id)
        if job.is_alive and name in (submission_id, match and match["request"]):
            jobs.stop(submission_id)
            stopped.append(submission_id)
    return tuple(stopped)


_LEVELS: dict[TaskPhase, int] = {"gate failed": logging.WARNING, "failed": logging.ERROR}


_ENTRY_PHASES: dict[TaskPhase, EntryPhase] = {
    "waiting": "waiting",
    "running": "running",
    "published": "done",
    "gate failed": "failed",
    "failed": "failed",
}


def _show_all(show: ShowEntry, tasks: Sequence[Task]) -> None:
    for task in tasks:
        run = task.decision.run
        show(
            EntryProgress(
                name=run.name,
                priority=run.entry.settings.priority,
                phase=_ENTRY_PHASES[task.phase],
                text=task.text or task.job,
            )
        )


@contextlib.contextmanager
def watch_tasks(outcomes: Sequence[Outcome]) -> Iterator[ShowTasks]:
    """Yield what shows the tasks: a live view on a terminal, a line per change elsewhere.

    Args:
        outcomes: of all entries; those that are not to do have no task.
    """
    if is_live():
        with watch_catalog([entry_progress(outcome) for outcome in outcomes]) as show:
            yield partial(_show_all, show)
        return
    shown: dict[str, tuple[str, str]] = {}

    def show_changes(tasks: Sequence[Task]) -> None:
        for task in tasks:
            state = task.phase, task.job
            if shown.get(task.request.request_id) != state:
                shown[task.request.request_id] = state
                more = f": {task.text}" if task.text else ""
                log_event(
                    task.phase,
                    f"{task.name}: {task.phase} {task.job}{more}",
                    task.labels | {"job": task.job},
                    level=_LEVELS.get(task.phase, logging.INFO),
                )

    yield show_changes


def tasks_table(tasks: Sequence[Task]) -> Table:
    """One line per request."""
    table = Table("run", "state", "job", "attempts", "")
    for task in tasks:
        cells = (task.name, task.phase, task.job, str(task.started), task.text)
        table.add_row(*map(Text, cells))
    return table
