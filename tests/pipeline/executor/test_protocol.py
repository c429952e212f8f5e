import time

import pytest

from pipeline.executor.protocol import LocalExecutor, TimedWorker
from pipeline.executor.ray_cluster import Resources, worker_environment


class Adder:
    def add(self, left: int, right: int) -> int:
        return left + right

    def fail(self) -> None:
        time.sleep(0.01)
        raise KeyError("mine")


def test_handles_stand_for_results() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    first = executor.submit(0, "add", 1, 2)
    assert executor.fetch([executor.submit(1, "add", first, 4)]) == [7]


def test_seconds_are_counted_once_and_of_failures_too() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    executor.submit(0, "add", 1, 2)
    with pytest.raises(KeyError, match="mine"):
        executor.submit(1, "fail")
    taken = executor.seconds()
    assert set(taken) == {"add", "fail"}
    assert taken["fail"] >= 0.01
    assert executor.seconds() == {}


def test_a_timed_worker_adds_up_by_method() -> None:
    worker = TimedWorker(Adder())
    for _ in range(3):
        worker.call("add", 1, 1)
    assert set(worker.take_seconds()) == {"add"}
    assert worker.take_seconds() == {}


def test_a_worker_is_given_its_backend_and_threads_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    given = worker_environment(Resources(workers=2, threads=3))
    assert given["KERAS_BACKEND"] == "jax"
    assert given["NPROC"] == given["OMP_NUM_THREADS"] == "3"
    assert given["JAX_PLATFORMS"] == "cpu"
    assert "canary" not in str(given)
    assert "JAX_PLATFORMS" not in worker_environment(Resources(workers=1, threads=1, gpus=1))
