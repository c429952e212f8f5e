"""A schedule on paper starts runs in the order in which `nightly` and `submit` start them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.catalog.catalog_file import parse_catalog
from jobs.catalog.request import Request
from jobs.fleet.fulfil import Fulfilled
from jobs.fleet.nightly import Survey, run_stale
from jobs.fleet.simulation import SimulatedRun, simulate
from jobs.fleet.staleness import Decision, decide
from jobs.fleet.submission import Submission
from pipeline.errors import PipelineError
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.test_submission import FakeJobs, carried_out

WORKERS = 6
NUMBER = 12


@pytest.fixture
def root(request: pytest.FixtureRequest) -> ObjectStore:
    return open_store(f"memory://schedule/{request.node.name.partition('[')[0]}{id(request)}")


def some_decisions(root: ObjectStore, folder: Path, seed: int) -> list[Decision]:
    """Runs that were never made, of several priorities, as a catalog of theirs is decided."""
    draw = random.Random(seed)
    (folder / "config.json").write_text("{}")
    text = f"root: {root.root_url}\ndefaults: {{recipes: [int8]}}\nmodels:\n"
    for i in range(NUMBER):
        priority = draw.randint(0, 2)
        text += f"  - {{name: m{i}, preset: {folder}, priority: {priority}}}\n"
    return list(decide(root, parse_catalog(text, where="c", folder=None), save_verified=True))


def on_paper(decisions: list[Decision], seed: int) -> list[SimulatedRun]:
    """The same runs, each with some workers and seconds, as the catalog writes them."""
    draw = random.Random(f"costs {seed}")
    return [
        SimulatedRun(
            name=f"m{i}",
            workers=draw.choice([1, 1, 2, 4, WORKERS]),
            seconds=float(draw.randint(1, 30)),
            priority={one.request.model: one.run.entry.settings.priority for one in decisions}[
                f"m{i}"
            ],
        )
        for i in range(NUMBER)
    ]


class PlayedCluster(FakeJobs):
    """Jobs that last as long as their runs do on paper, once they have workers.

    Whenever some are free, the first job that they are enough for gets them.

    Attributes:
        submitted, began: when each job was, by model.
    """

    def __init__(self, root: ObjectStore, decisions: list[Decision], runs: list[SimulatedRun]):
        super().__init__()
        self._root = root
        self._decisions = {one.request.request_id: one for one in decisions}
        self._runs = {run.name: run for run in runs}
        self._ends: dict[str, float] = {}
        self.now = 0.0
        self.submitted: dict[str, float] = {}
        self.began: dict[str, float] = {}

    def _decision(self, job: str) -> Decision:
        return self._decisions[job.rpartition("-attempt")[0]]

    def _run(self, job: str) -> SimulatedRun:
        return self._runs[self._decision(job).request.model]

    def submit(self, submission_id: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        super().submit(submission_id, entrypoint, metadata)
        self.submitted[metadata["model"]] = self.now

    def end_due(self) -> None:
        """End what has lasted long enough."""
        for job, end in list(self._ends.items()):
            if end <= self.now:
                del self._ends[job]
                carried_out(self._root, self._decision(job))
                self.end(job, 0)

    def give_workers(self) -> None:
        """Give free workers to jobs that wait for theirs."""
        for job in self.jobs:
            free = WORKERS - sum(self._run(one).workers for one in self._ends)
            run = self._run(job)
            if run.name not in self.began and run.workers <= free:
                self.began[run.name], self._ends[job] = self.now, self.now + run.seconds


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("at_once", "poll_seconds"), [(1, 1), (3, 5), (4, 1), (NUMBER, 3)])
def test_submit_starts_runs_when_the_schedule_says(
    root: ObjectStore, tmp_path: Path, seed: int, at_once: int, poll_seconds: int
) -> None:
    decisions = some_decisions(root, tmp_path, seed)
    runs = on_paper(decisions, seed)
    cluster = PlayedCluster(root, decisions, runs)
    submission = Submission(root=root, jobs=cluster, decisions=decisions, at_once=at_once)
    while not all(task.is_over for task in submission.tasks):
        cluster.end_due()
        if cluster.now % poll_seconds == 0:
            submission.step()
        cluster.give_workers()
        cluster.now += 1
    assert {task.phase for task in submission.tasks} == {"published"}
    schedule = simulate(runs, WORKERS, at_once=at_once, poll_seconds=float(poll_seconds))
    assert {one.run.name: one.submitted for one in schedule.entries} == cluster.submitted
    assert {one.run.name: one.start for one in schedule.entries} == cluster.began


def test_nightly_starts_runs_in_the_order_of_one_at_a_time(
    root: ObjectStore, tmp_path: Path
) -> None:
    decisions = some_decisions(root, tmp_path, seed=7)
    made = []

    def record(request: Request) -> Fulfilled:
        made.append(request.model)
        raise PipelineError("not on this machine")

    assert {one.result for one in run_stale(root, Survey.of(decisions), record)} == {"failed"}
    runs = on_paper(decisions, seed=7)
    assert made == [one.run.name for one in simulate(runs, WORKERS, at_once=1).entries]
    assert made != [run.name for run in runs]
