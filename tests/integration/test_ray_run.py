"""A run on a real cluster: the same bytes by any workers, clear errors, no secrets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.executor.ray_executor
from jobs.metrics import RunMetrics
from pipeline.errors import SourceError
from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError
from pipeline.executor.ray_cluster import allocate_on_cluster
from pipeline.executor.ray_executor import RayExecutor
from pipeline.fidelity import Fidelity
from pipeline.plan import Plan, read_plan
from pipeline.remote_planning import plan_on, plan_run, start_worker
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.storage.object_store import open_store
from tests.integration.ray_cluster import NUM_CPUS, RunningCluster, quiet_environment
from tests.pipeline.tiny_runs import NUM_BLOCKS, lasting, recipe, source, text_file
from tests.s3 import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
# As a process that calls the command does, and then tells what it has imported.
_COMMAND = """
import atexit, sys
from pathlib import Path
heavy = {"jax", "keras", "keras_hub", "tensorflow", "torch"}
told = Path(sys.argv.pop(1))
atexit.register(lambda: told.write_text(" ".join(sorted(heavy & set(sys.modules)))))
from jobs.cli.main import main
main()
"""


@contextmanager
def executor_of(
    workers: int, output: Path, start: Callable[..., Callable[[], object]] = start_worker
) -> Iterator[tuple[RayExecutor, Plan]]:
    import ray

    executor = RayExecutor(
        Allocation(workers=workers, threads=1), partial(start, str(source()), str(output))
    )
    try:
        # All of them read the weights; the plan is the same.
        plan, windows = plan_on(executor, str(source()), recipe("gptq"), 1)
        claim(open_store(str(output)), plan, windows)
        yield executor, plan
    finally:
        for actor in executor._actors:  # or they keep their CPUs until this process ends
            ray.kill(actor)


def process_ids(executor: RayExecutor) -> list[int]:
    import ray

    calls = [actor.run.options(num_returns=2).remote(os.getpid) for actor in executor._actors]
    return [ray.get(process_id) for _, process_id in calls]


@pytest.fixture(scope="module")
def of_one_worker(driver: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("one") / "run"
    with executor_of(1, output) as (executor, plan):
        quantize(plan, open_store(str(output)), executor, lambda step: None)
    return lasting(open_store(str(output)))


@pytest.mark.parametrize(
    ("workers", "killed_after"),
    [
        pytest.param(2, 1, marks=pytest.mark.exhaustive),
        pytest.param(3, None, marks=pytest.mark.exhaustive),
        # Deaths at any moment are shown without Ray, in tests/faults/test_kill_everywhere.py.
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_any_workers_leave_the_same_bytes_though_one_is_killed(
    workers: int,
    killed_after: int | None,
    of_one_worker: dict[str, bytes],
    tmp_path: Path,
) -> None:
    steps: list[Step] = []
    with executor_of(workers, tmp_path / "run") as (executor, plan):
        # Holds the second of the two shards; whoever holds none may die unnoticed.
        victim = process_ids(executor)[1]

        def report(step: Step) -> None:
            if step.event == "committed" and step.part == killed_after and victim not in killed:
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
            steps.append(step)

        killed: list[int] = []
        store = open_store(str(tmp_path / "run"))
        quantize(plan, store, executor, report, keep_every=1)
        assert (victim in process_ids(executor)) == (killed_after is None)
    assert lasting(store) == of_one_worker
    committed = [step.part for step in steps if step.event == "committed"]
    assert sorted(set(committed)) == committed == list(range(NUM_BLOCKS + 1))
    assert any(step.event == "lost" for step in steps) == (killed_after is not None)


class DyingInCommit:
    """A worker whose process is killed once: in the commit of block 0, once it captured block 1."""

    def __init__(self, worker: Any, died: Path) -> None:
        self._worker = worker
        self._died = died
        self._captured = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def capture(self, block: int, *args: Any, **named: Any) -> Any:
        found = self._worker.capture(block, *args, **named)
        if block == 1:
            self._captured.set()
        return found

    def commit(self, part: int, *args: Any) -> Any:
        if part == 1 and not self._died.exists():
            assert self._captured.wait(60.0), "the next block waits for the commit"
            self._died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._worker.commit(part, *args)


def start_dying_worker(source_url: str, run_url: str) -> Callable[[], object]:
    open_worker = start_worker(source_url, run_url)
    return lambda: DyingInCommit(open_worker(), Path(run_url).parent / "died")


@pytest.mark.exhaustive
def test_a_worker_killed_in_a_commit_while_it_captures_the_next_block_leaves_the_same_bytes(
    of_one_worker: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[Step] = []
    output = tmp_path / "run"
    with executor_of(2, output, start_dying_worker) as (executor, plan):
        quantize(plan, open_store(str(output)), executor, steps.append, keep_every=1)
    assert (tmp_path / "died").exists()
    assert [step.event for step in steps].count("lost") == 1
    committed = [step.part for step in steps if step.event == "committed"]
    assert committed == list(range(NUM_BLOCKS + 1))
    assert lasting(open_store(str(output))) == of_one_worker


@pytest.mark.exhaustive
@pytest.mark.usefixtures("driver")
def test_an_error_of_planning_arrives_as_it_was_raised(tmp_path: Path) -> None:
    import ray

    executor = RayExecutor(
        Allocation(workers=1, threads=1), partial(start_worker, "/nowhere", str(tmp_path / "run"))
    )
    try:
        with pytest.raises(SourceError, match=r"/nowhere: no config\.json there"):
            executor.run(plan_run, "/nowhere", recipe("int8"), 1)
    finally:
        ray.kill(executor._actors[0])


@pytest.mark.exhaustive
@pytest.mark.usefixtures("driver")
def test_a_worker_that_cannot_be_made_says_why_at_once(tmp_path: Path) -> None:
    with executor_of(1, tmp_path / "run") as (_, plan):
        pass
    import ray

    executor = RayExecutor(
        Allocation(workers=1, threads=1), partial(start_worker, "/nowhere", str(tmp_path / "run"))
    )
    try:
        with pytest.raises(SourceError, match="/nowhere"):
            quantize(plan, open_store(str(tmp_path / "run")), executor, lambda step: None)
    finally:
        ray.kill(executor._actors[0])


@pytest.mark.exhaustive
@pytest.mark.usefixtures("driver")
def test_a_worker_that_cannot_start_says_why_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline.executor.ray_executor, "worker_environment", lambda _: {"KERAS_BACKEND": "no"}
    )
    executor = RayExecutor(
        Allocation(workers=1, threads=1),
        partial(start_worker, str(source()), str(tmp_path / "run")),
    )
    with pytest.raises(
        ExecutorError, match=r"cannot start \(.*import backend : no\); check .* all nodes"
    ):
        executor.run(plan_run, str(source()), recipe("int8"), 1)


@pytest.mark.usefixtures("driver")
def test_allocations_are_those_of_the_cluster() -> None:
    found = allocate_on_cluster(ComputeSpec(workers=3, threads=2))
    assert (found.workers, found.threads, found.gpus) == (3, 2, 0)
    [node] = found.nodes
    assert node.workers == 3
    assert node.memory_bytes > 1 << 28
    assert allocate_on_cluster(ComputeSpec()).threads == NUM_CPUS
    with pytest.raises(ExecutorError, match="no GPU; use --device cpu"):
        allocate_on_cluster(ComputeSpec(device="gpu"))


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", ["llama", "modèle-日本", "cut\udce9", "a %41 \\ b"])
def test_models_and_recipes_of_any_name_are_counted(name: str) -> None:
    RunMetrics(model=name, recipe=name).ended("finished")
    RunMetrics(model=name, recipe="w4").judged(
        Fidelity(num_windows=1, count=1, source_perplexity=20.0, result_perplexity=22.0)
    )


@dataclass(frozen=True)
class Outcome:
    """What a process that called the command left behind."""

    status: int
    out: str
    err: str
    imported: str


def call(folder: Path, *arguments: object, where: Path = ROOT, **environment: str) -> Outcome:
    told = folder / "imported"
    finished = subprocess.run(
        # -P: what is installed, as for a command, and not what lies in the current folder.
        [sys.executable, "-P", "-c", _COMMAND, told, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=where,
        env=quiet_environment() | environment,
        timeout=240,
    )
    return Outcome(finished.returncode, finished.stdout, finished.stderr, told.read_text())


# Once a session, as the store: a process that gives away some of a module's tests and gets them
# back sets the module up twice, and would find the run finished.
@pytest.fixture(scope="session")
def on_s3(
    cluster: RunningCluster, s3: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """Quantize from s3:// to s3://, by the command line, with a secret in the environment."""
    folder = tmp_path_factory.mktemp("s3")
    for path in sorted(source().rglob("*")):
        if path.is_file():
            key = f"presets/llama/{path.relative_to(source())}"
            s3.client().put_object(Bucket="quantfleet", Key=key, Body=path.read_bytes())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe("gptq").to_dict()))
    return call(
        folder,
        *("quantize", "s3://quantfleet/presets/llama"),
        *("--recipe", folder / "recipe.yaml", "--output", "s3://quantfleet/runs/1"),
        *("--address", cluster.address, "--workers", 2, "--threads", 1, "--json"),
        *("--evaluate-on", text_file(), "--windows", 2),
        **s3.environment,
    )


def objects(s3: S3Server, prefix: str) -> dict[str, bytes]:
    pages = (
        s3.client().get_paginator("list_objects_v2").paginate(Bucket="quantfleet", Prefix=prefix)
    )
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {
        key.removeprefix(prefix): s3.client()
        .get_object(Bucket="quantfleet", Key=key)["Body"]
        .read()
        for key in keys
    }


@pytest.mark.exhaustive
def test_the_command_quantizes_from_object_storage_to_object_storage(on_s3: Outcome) -> None:
    assert on_s3.status == 0, on_s3.err
    summary = json.loads(on_s3.out)
    assert summary["fidelity"]["num_windows"] == 2
    assert summary["schemes"][0]["scheme"] == "gptq/4/32"
    assert on_s3.err.count("committed ") == NUM_BLOCKS + 1


@pytest.mark.exhaustive
def test_what_is_written_does_not_depend_on_where(
    on_s3: Outcome, s3: S3Server, of_one_worker: dict[str, bytes]
) -> None:
    assert on_s3.status == 0, on_s3.err
    found = objects(s3, "runs/1/")
    # The plan and whatever names its digest do not; where the source lies is only noted there.
    expected = {key: data for key, data in of_one_worker.items() if key != "plan.json"}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.exhaustive
def test_the_driver_imports_no_array_library(on_s3: Outcome) -> None:
    assert on_s3.status == 0, on_s3.err
    assert on_s3.imported == ""


@pytest.mark.exhaustive
def test_no_secret_is_written_anywhere(
    on_s3: Outcome, s3: S3Server, cluster: RunningCluster
) -> None:
    assert on_s3.status == 0, on_s3.err
    written = {**objects(s3, "runs/1/"), "stdout": on_s3.out.encode(), "stderr": on_s3.err.encode()}
    for path in cluster.session_folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            written[str(path)] = path.read_bytes()
    assert len([name for name in written if "/logs/" in name]) > 10
    assert any(name.startswith("events/") for name in written)
    for secret in (SECRET_KEY, ACCESS_KEY):
        found = [name for name, data in written.items() if secret.encode() in data]
        assert found == []


@pytest.mark.exhaustive
def test_a_mistake_is_one_line_from_a_cluster_too(cluster: RunningCluster, tmp_path: Path) -> None:
    given = ("--recipe", "int8", "--output", tmp_path / "out", "--address", cluster.address)
    outcome = call(tmp_path, "quantize", "/nowhere", *given, "--workers", 1, "--threads", 1)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1].startswith("quantfleet: /nowhere: no config.json")
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_names_of_any_alphabet_reach_everything_that_is_written(tmp_path: Path) -> None:
    preset = tmp_path / "modèle-日本"
    shutil.copytree(source(), preset)
    output = tmp_path / "sortie-été" / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe("int8").to_dict()))
    given = ("--recipe", tmp_path / "recipe.yaml", "--output", output, "--threads", 1)
    environment = {"QUANTFLEET_LOG": "json"}
    outcome = call(tmp_path, "quantize", preset, *given, "--json", **environment)
    assert outcome.status == 0, outcome.err
    store = open_store(str(output))
    assert read_plan(store).source_url == str(preset)
    assert read_manifest(store).plan_digest == json.loads(outcome.out)["plan_digest"]
    events = [json.loads(line) for line in outcome.err.splitlines()]
    assert {event["model"] for event in events if event["event"] == "committed"} == {preset.name}


@pytest.mark.exhaustive
def test_a_user_s_own_folders_are_not_taken_for_ours_and_paths_are_theirs(tmp_path: Path) -> None:
    for name in ("jobs", "pipeline", "quantizer"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('not ours')")
    (tmp_path / "mine.txt").write_bytes(Path(text_file()).read_bytes())
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe("gptq").to_dict() | {"name": "mine"})
    )
    given = ("--recipe", "recipe.yaml", "--texts", "mine.txt", "--output", "out")
    outcome = call(
        tmp_path,
        "quantize",
        source(),
        *given,
        "--threads",
        1,
        "--dry-run",
        "--json",
        where=tmp_path,
    )
    assert outcome.status == 0, outcome.err
    assert "plan_digest" in json.loads(outcome.out)


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    given = ("--recipe", "int8", "--output", tmp_path / "out", "--address", "127.0.0.1:9")
    outcome = call(tmp_path, "quantize", source(), *given)
    assert outcome.status == 3
    assert outcome.err.splitlines()[-1].startswith("quantfleet: no Ray cluster at 127.0.0.1:9")
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
