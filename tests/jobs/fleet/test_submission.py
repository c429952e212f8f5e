"""Jobs start in order, a few at a time, once each; storage decides which succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.catalog.catalog_file import parse_catalog
from jobs.fleet.staleness import Decision, decide
from jobs.fleet.submission import Submission, exit_code_of_tasks, stop_jobs
from jobs.publish.releases import publish
from jobs.publish.verdict import Verdict, save_verdict
from pipeline.executor.ray_jobs import RayJob, RayJobs
from pipeline.run.records import MANIFEST_KEY, Manifest
from pipeline.storage.object_store import ObjectStore, open_store


class FakeJobs(RayJobs):
    """A cluster that does only what it is told.

    Attributes:
        jobs: by submission id.
        entrypoints: of those that were submitted.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, RayJob] = {}
        self.entrypoints: list[str] = []
        self.stopped: list[str] = []

    def list(self) -> Mapping[str, RayJob]:
        return dict(self.jobs)

    def submit(self, submission_id: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        assert submission_id not in self.jobs
        self.entrypoints.append(entrypoint)
        self.set(submission_id, "PENDING")

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.set(submission_id, "STOPPED")

    def set(self, submission_id: str, status: str, exit_code: int | None = None) -> None:
        self.jobs[submission_id] = RayJob(
            submission_id=submission_id, status=status, exit_code=exit_code
        )

    def end(self, submission_id: str, exit_code: int | None) -> None:
        self.set(submission_id, "SUCCEEDED" if exit_code == 0 else "FAILED", exit_code)


@pytest.fixture
def root(request: pytest.FixtureRequest) -> ObjectStore:
    return open_store(f"memory://submission/{request.node.name}")


@pytest.fixture
def decisions(root: ObjectStore, tmp_path: Path) -> list[Decision]:
    """Four runs that were never made; the last is the most urgent."""
    entries = []
    for index, name in enumerate(("a", "b", "c", "urgent")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        entries.append(f"{{name: {name}, preset: {name}, priority: {index // 3}}}")
    text = f"root: {root.root_url}\ndefaults: {{recipes: [int8]}}\nmodels:\n"
    text += "".join(f"  - {entry}\n" for entry in entries)
    catalog = parse_catalog(text, where="catalog.yaml", folder=tmp_path)
    return list(decide(root, catalog, save_verified=True))


def carried_out(root: ObjectStore, decision: Decision, failures: tuple[str, ...] = ()) -> None:
    """Leave in storage what a job would."""
    request = decision.request
    run = open_store(f"{root.root_url}/runs/{request.run_id}")
    manifest = Manifest(plan_digest="0" * 64, files={}, records={}, provenance={})
    run.put(MANIFEST_KEY, manifest.to_json())
    verdict = Verdict(
        request_id=request.request_id,
        model=request.model,
        recipe_name=request.recipe_name,
        run_id=request.run_id,
        plan_digest="0" * 64,
        manifest_sha256=manifest.record_sha256,
        source_bytes=2,
        stored_bytes=1,
        quality=None,
        gate=None,
        failures=failures,
    )
    save_verdict(root, verdict)
    if verdict.passed:
        publish(root, request, verdict)


def phases(submission: Submission) -> dict[str, str]:
    return {task.request.model: task.phase for task in submission.tasks}


def job(decision: Decision, attempt: int) -> str:
    return f"{decision.request.request_id}-attempt{attempt}"


def test_urgent_runs_start_first_and_within_the_limit(
    root: ObjectStore, decisions: list[Decision]
) -> None:
    jobs = FakeJobs()
    submission = Submission(root=root, jobs=jobs, decisions=decisions, at_once=2)
    urgent, a, b, _ = decisions
    submission.step()
    assert list(jobs.jobs) == [job(urgent, 1), job(a, 1)]
    assert jobs.entrypoints[0] == (
        f"quantfleet fulfil {root.root_url}/requests/{urgent.request.request_id}.json "
        "--address auto"
    )
    assert root.exists(f"requests/{urgent.request.request_id}.json")
    submission.step()
    assert len(jobs.jobs) == 2
    carried_out(root, a)
    jobs.end(job(a, 1), 0)
    submission.step()
    assert list(jobs.jobs)[2:] == [job(b, 1)]
    assert phases(submission) == {
        "urgent": "running", "a": "published", "b": "running", "c": "waiting",
    }  # fmt: skip


def test_running_jobs_are_attached_to(root: ObjectStore, decisions: list[Decision]) -> None:
    jobs = FakeJobs()
    Submission(root=root, jobs=jobs, decisions=decisions, at_once=9).step()
    before = dict(jobs.jobs)
    again = Submission(root=root, jobs=jobs, decisions=decisions, at_once=9)
    again.step()
    assert jobs.jobs == before
    assert set(phases(again).values()) == {"running"}
    for one in decisions:
        carried_out(root, one)
        jobs.end(job(one, 1), 0)
    again.step()
    assert set(phases(again).values()) == {"published"}
    assert exit_code_of_tasks(again.tasks) == 0


@pytest.mark.parametrize("exit_code", [None, 1, 3, 137, 0])
def test_failed_jobs_are_resumed_up_to_a_limit(
    root: ObjectStore, decisions: list[Decision], exit_code: int | None
) -> None:
    """Even where Ray says that it ended well: storage knows of nothing."""
    jobs = FakeJobs()
    [first, *_] = decisions
    submission = Submission(root=root, jobs=jobs, decisions=decisions[:1], attempts=2)
    submission.step()
    jobs.end(job(first, 1), exit_code)
    submission.step()
    assert list(jobs.jobs) == [job(first, 1), job(first, 2)]
    jobs.end(job(first, 2), exit_code)
    submission.step()
    [task] = submission.tasks
    assert (task.phase, task.started, len(task.failed)) == ("failed", 2, 2)
    assert exit_code_of_tasks(submission.tasks) == 3
    # Another day, another submission: numbers go on, and it is tried anew.
    later = Submission(root=root, jobs=jobs, decisions=decisions[:1], attempts=2)
    later.step()
    assert list(jobs.jobs)[2:] == [job(first, 3)]


def test_bad_input_is_not_retried(root: ObjectStore, decisions: list[Decision]) -> None:
    jobs = FakeJobs()
    submission = Submission(root=root, jobs=jobs, decisions=decisions[:1], attempts=9)
    submission.step()
    jobs.end(job(decisions[0], 1), 2)
    submission.step()
    assert phases(submission) == {"urgent": "failed"}
    assert "exit code 2" in submission.tasks[0].text


def test_a_failed_gate_is_not_retried(root: ObjectStore, decisions: list[Decision]) -> None:
    jobs = FakeJobs()
    submission = Submission(root=root, jobs=jobs, decisions=decisions[:1])
    submission.step()
    carried_out(root, decisions[0], failures=("divergence 9 nats, more than 1",))
    jobs.end(job(decisions[0], 1), 5)
    submission.finish(lambda tasks: None)
    assert phases(submission) == {"urgent": "gate failed"}
    assert submission.tasks[0].text == "divergence 9 nats, more than 1"
    assert exit_code_of_tasks(submission.tasks) == 5


def test_a_job_lost_after_it_published_counts_as_published(
    root: ObjectStore, decisions: list[Decision]
) -> None:
    jobs = FakeJobs()
    submission = Submission(root=root, jobs=jobs, decisions=decisions[:1])
    submission.step()
    carried_out(root, decisions[0])
    jobs.jobs.clear()  # the head was lost, and all it knew
    submission.step()
    assert phases(submission) == {"urgent": "published"}


def test_cancel_stops_the_living_jobs_of_one_request_only(
    root: ObjectStore, decisions: list[Decision]
) -> None:
    jobs = FakeJobs()
    Submission(root=root, jobs=jobs, decisions=decisions, at_once=9).step()
    jobs.set("urgent-int8", "RUNNING")
    request_id: Any = decisions[0].request.request_id
    assert stop_jobs(jobs, request_id) == (job(decisions[0], 1),)
    assert stop_jobs(jobs, request_id) == ()
    assert jobs.stopped == [job(decisions[0], 1)]


def test_a_composition_starts_when_its_runs_are_over(root: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "texts.txt").write_text("text")
    text = (
        f"root: {root.root_url}\nmodels:\n  - name: a\n    preset: a\n    recipes:\n"
        "      - {name: int4, scheme: {mode: int4}}\n      - {name: int8, scheme: {mode: int8}}\n"
        "    compose: {target_bits: 6, measure_on: [texts.txt]}\n"
    )
    catalog = parse_catalog(text, where="catalog.yaml", folder=tmp_path)
    runs = list(decide(root, catalog, save_verified=True))
    jobs = FakeJobs()
    submission = Submission(root=root, jobs=jobs, decisions=runs)
    submission.step()
    assert [task.phase for task in submission.tasks] == ["running", "running", "waiting"]
    carried_out(root, runs[0])
    jobs.end(job(runs[0], 1), 0)
    submission.step()
    assert submission.tasks[2].phase == "waiting"
    carried_out(root, runs[1], failures=("divergence 1 nats, more than 0.5",))
    jobs.end(job(runs[1], 1), 5)  # a run that failed its gate has blocks all the same
    submission.step()
    assert [task.phase for task in submission.tasks] == ["published", "gate failed", "running"]

    again = Submission(root=root, jobs=FakeJobs(), decisions=runs, attempts=1)
    again.step()
    for task in again.tasks[:2]:
        task.phase = "failed"
    again.step()
    composed = again.tasks[2]
    assert (composed.phase, composed.started) == ("failed", 0)
    assert composed.text == "not composed, since a × int4 failed"
