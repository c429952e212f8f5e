"""Statistics captured, and blocks solved on them, by workers of a real cluster, and on S3."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from jobs.shared_statistics import with_statistics
from pipeline.executor.protocol import Allocation
from pipeline.executor.ray_executor import RayExecutor
from pipeline.plan import Plan
from pipeline.remote_planning import plan_on, start_worker
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.run.lease import Lease, acquire
from pipeline.storage.object_store import ObjectStore, open_store
from tests.integration.test_ray_run import process_ids
from tests.pipeline.float_runs import execute_in_float, lasting_all, planned_in_float
from tests.pipeline.tiny_runs import NUM_BLOCKS, recipe, source
from tests.s3 import S3Server


@contextmanager
def executor_of(workers: int, run_url: str) -> Iterator[RayExecutor]:
    import ray

    start = partial(start_worker, str(source()), run_url)
    executor = RayExecutor(Allocation(workers=workers, threads=1), start)
    try:
        yield executor
    finally:
        for actor in executor._actors:  # or they keep their CPUs until this process ends
            ray.kill(actor)


def carry_out(folder: Path, workers: int, killed_after: int | None = None) -> list[Step]:
    """Capture and solve; returns the steps of both.

    Args:
        killed_after: once this part is captured, a worker that holds a shard is killed.
    """
    store = open_store(str(folder))
    steps: list[Step] = []
    with executor_of(workers, store.root_url) as executor:
        plan, windows = plan_on(executor, str(source()), recipe("gptq", statistics="float"), 1)
        claim(store, plan, windows)
        victim = process_ids(executor)[-1] if killed_after is not None else 0

        def report(step: Step) -> None:
            steps.append(step)
            if step.event == "committed" and step.part == killed_after and victim not in killed:
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        def capture(wanted: Plan, found: ObjectStore, held: Lease) -> None:
            executor.work_on(found.root_url)
            quantize(wanted, found, executor, report, keep_every=1, check_lease=held.check)
            executor.work_on(store.root_url)

        killed: list[int] = []
        with_statistics(
            plan, store, acquire, capture, lambda: quantize(plan, store, executor, steps.append)
        )
    return steps


@pytest.fixture(scope="module")
def of_one_worker(driver: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("one")
    carry_out(folder, 1)
    return lasting_all(open_store(str(folder)))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("workers", "killed_after"),
    [
        pytest.param(2, None, marks=pytest.mark.exhaustive),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, None, marks=pytest.mark.slow),
    ],
)
def test_any_workers_leave_the_same_bytes_though_one_is_killed(
    workers: int, killed_after: int | None, of_one_worker: dict[str, bytes], tmp_path: Path
) -> None:
    steps = carry_out(tmp_path, workers, killed_after)
    assert lasting_all(open_store(str(tmp_path))) == of_one_worker
    assert sum("/sums/" in key for key in of_one_worker) == NUM_BLOCKS
    assert any(step.event == "lost" for step in steps) == (killed_after is not None)


@pytest.mark.exhaustive
def test_statistics_on_s3_are_those_on_a_disk(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.create_bucket("float-statistics")
    on_disk, on_s3 = open_store(str(tmp_path)), open_store("s3://float-statistics/run")
    for store in (on_disk, on_s3):
        execute_in_float(planned_in_float("gptq"), store, workers=2, keep_every=1)
    assert lasting_all(on_s3) == lasting_all(on_disk)
