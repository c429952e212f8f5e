"""`quantfleet submit`: one Ray Job for each stale run, some at once, the most urgent first.

Ray is asked only who is alive. Whether a run is done, storage alone decides: a job may have ended
well whose result was damaged since, or have been lost after it had published.

How a submission stands: a live table on a terminal, a line for each change elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.catalog.request import Request, save_request
from jobs.fleet.staleness import Decision, decision
from jobs.logging import STDERR, is_json, log_event
from pipeline.executor.ray_jobs import Jobs, RayJob
from pipeline.storage.object_store import ObjectStore

Phase = Literal["waiting", "running", "published", "gate failed", "failed"]

_ATTEMPT = re.compile(r"(?P<request>.+)-attempt(?P<number>\d{1,9})")
# What a repetition cannot mend: bad input.
_HOPELESS = frozenset({2})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is tried.

    Attributes:
        at_once: jobs alive at the same time.
        attempts: jobs started for one request in this submission.
        poll_seconds: between looks.
    """

    at_once: int = 4
    attempts: int = 3
    poll_seconds: float = 5.0


@dataclass
class Task:
    """One stale run on its way.

    Attributes:
        decision: why it is to be done.
        job: the latest submission id; "" before the first.
        started: jobs that this submission started for it.
        text: why it failed.
    """

    decision: Decision
    phase: Phase = "waiting"
    job: str = ""
    started: int = 0
    text: str = ""
    failed: list[str] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.decision.request

    @property
    def name(self) -> str:
        return self.decision.wanted.name

    @property
    def is_over(self) -> bool:
        return self.phase in ("published", "gate failed", "failed")


class Submission:
    """Requests in the order of their priority, and the jobs that carry them out."""

    def __init__(
        self,
        root: ObjectStore,
        jobs: Jobs,
        decisions: Sequence[Decision],
        limits: Limits,
        entrypoint: str = "quantfleet",
    ) -> None:
        """Prepare; nothing is asked of the cluster yet.

        Args:
            decisions: those that are stale are carried out, in their order.
            entrypoint: the command on the nodes' PATH, with whatever comes before it.
        """
        self.tasks = [Task(decision=one) for one in decisions if one.state == "stale"]
        self._root = root
        self._jobs = jobs
        self._limits = limits
        self._entrypoint = entrypoint

    def step(self) -> None:
        """Look once: attach to the living, judge the ended, start what there is room for.

        Raises:
            ExecutorError: the cluster does not answer.
            StorageError: the store cannot be used.
        """
        known = self._jobs.list()
        attempts = _attempts(known)
        for task in self.tasks:
            if not task.is_over:
                self._look(task, attempts.get(task.request.request_id, {}))
        alive = sum(1 for task in self.tasks if task.phase == "running")
        for task in self.tasks:
            if task.phase == "waiting" and alive < self._limits.at_once:
                numbers = attempts.get(task.request.request_id, {})
                self._start(task, max(numbers, default=0) + 1)
                alive += 1

    def finish(self, tell: Callable[[Sequence[Task]], None]) -> None:
        """Step until every task is over."""
        while True:
            self.step()
            tell(self.tasks)
            if all(task.is_over for task in self.tasks):
                return
            time.sleep(self._limits.poll_seconds)

    def _look(self, task: Task, attempts: Mapping[int, RayJob]) -> None:
        living = [job for job in attempts.values() if job.is_alive]
        if living:
            task.phase, task.job = "running", living[-1].submission_id
            return
        task.phase = "waiting"
        if task.job:
            self._settle(task, attempts)

    def _settle(self, task: Task, attempts: Mapping[int, RayJob]) -> None:
        """Of a request whose job has ended: what storage says became of it."""
        now = decision(self._root, task.decision.wanted, note=True)
        if now.state == "fresh" and now.current is not None:
            task.phase, task.text = "published", f"release {now.current.release.number}"
            return
        if now.state == "gate failed":
            task.phase, task.text = "gate failed", "; ".join(now.reasons)
            return
        ended = next((job for job in attempts.values() if job.submission_id == task.job), None)
        if ended is None:
            said = "is unknown to the cluster"
        elif ended.exit_code is None:
            said = f"ended ({ended.status.lower()})"
        else:
            said = f"ended with exit code {ended.exit_code}"
        task.failed.append(f"{task.job} {said}")
        hopeless = ended is not None and ended.exit_code in _HOPELESS
        if hopeless or task.started >= self._limits.attempts:
            task.phase = "failed"
            task.text = f"{task.failed[-1]}, after {task.started} attempt(s); see ray job logs"

    def _start(self, task: Task, number: int) -> None:
        url = save_request(self._root, task.request)
        task.job = f"{task.request.request_id}-attempt{number}"
        task.started += 1
        self._jobs.submit(
            task.job,
            f"{self._entrypoint} fulfil {shlex.quote(url)} --address auto",
            {
                "model": task.request.model,
                "recipe": task.request.recipe_name,
                "request": task.request.request_id,
                "run": task.request.run_id,
            },
        )
        task.phase = "running"


def exit_code_of_tasks(tasks: Sequence[Task]) -> int:
    """Of a submission: 3 where a run was given up, else 5 where a gate was not passed, else 0."""
    phases = {task.phase for task in tasks}
    return 3 if "failed" in phases else 5 if "gate failed" in phases else 0


def _attempts(known: Mapping[str, RayJob]) -> dict[str, dict[int, RayJob]]:
    """Jobs by request and number of the attempt, in order."""
    found: dict[str, dict[int, RayJob]] = {}
    for submission_id, job in known.items():
        match = _ATTEMPT.fullmatch(submission_id)
        if match:
            found.setdefault(match["request"], {})[int(match["number"])] = job
    return {request: dict(sorted(numbers.items())) for request, numbers in found.items()}


def stop_jobs(jobs: Jobs, wanted: str) -> tuple[str, ...]:
    """Stop what is alive of a submission, a request or a run; returns the submissions' ids.

    Args:
        wanted: a submission's or request's id.
    """
    stopped = []
    for submission_id, job in sorted(jobs.list().items()):
        match = _ATTEMPT.fullmatch(submission_id)
        if job.is_alive and (submission_id == wanted or (match and match["request"] == wanted)):
            jobs.stop(submission_id)
            stopped.append(submission_id)
    return tuple(stopped)


_LEVELS: dict[Phase, int] = {"gate failed": logging.WARNING, "failed": logging.ERROR}
Tell = Callable[[Sequence[Task]], None]


@contextlib.contextmanager
def watch_tasks() -> Iterator[Tell]:
    """Yield what a submission is to tell how it stands."""
    if STDERR.is_terminal and not is_json():
        with Live(console=STDERR, auto_refresh=False) as live:
            yield lambda tasks: live.update(tasks_table(tasks), refresh=True)
        return
    told: dict[str, tuple[str, str]] = {}

    def changes(tasks: Sequence[Task]) -> None:
        for task in tasks:
            state = (task.phase, task.job)
            if told.get(task.request.request_id) != state:
                told[task.request.request_id] = state
                more = f": {task.text}" if task.text else ""
                log_event(
                    task.phase,
                    f"{task.name}: {task.phase} {task.job}{more}",
                    {
                        "run": task.request.run_id,
                        "model": task.request.model,
                        "recipe": task.request.recipe_name,
                        "job": task.job,
                    },
                    level=_LEVELS.get(task.phase, logging.INFO),
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
