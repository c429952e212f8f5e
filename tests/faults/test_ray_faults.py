"""A cluster that loses nodes and messages: later, by fewer workers, but the same bytes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml

import pipeline.executor.ray_executor
from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError
from pipeline.executor.ray_cluster import allocate_on_cluster, connect
from pipeline.executor.ray_executor import RayExecutor
from pipeline.remote_planning import start_worker
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.storage.object_store import open_store
from tests.faults.lossy_run import run_lossy
from tests.faults.random_kills import Fleet, fleet, left, start
from tests.integration.ray_cluster import RunningCluster
from tests.pipeline.tiny_runs import NUM_BLOCKS, lasting, planned, recipe, source

pytestmark = [
    pytest.mark.ray,
    pytest.mark.exhaustive,
    # Ray's own processes are started from this one, where JAX has run; they execute at once.
    pytest.mark.filterwarnings("ignore:os.fork"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ALLOCATION = Allocation(workers=2, threads=1)
_SOON_WITHOUT_HEAD = """
import pipeline.executor.ray_cluster as cluster
cluster._CHECK_SECONDS, cluster._HEAD_SECONDS = 1.0, 5.0
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="module")
def expected(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What workers of the same kind leave where nothing happens: threads decide rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with connect(cluster.address):
            return run(tmp_path_factory.mktemp("undisturbed") / "run", lambda step: None)


@pytest.fixture
def nodes() -> Iterator[Fleet]:
    with fleet() as found:
        yield found


def run(output: Path, report: object, allocation: Allocation = ALLOCATION) -> dict[str, bytes]:
    store = open_store(str(output))
    given = planned("gptq")
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    executor = RayExecutor(allocation, partial(start_worker, str(source()), str(output)))
    quantize(given.plan, store, executor, report, keep_every=1)  # type: ignore[arg-type]
    return lasting(store)


def test_a_node_lost_for_good_leaves_the_run_to_the_others(
    nodes: Fleet, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.executor.ray_executor, "_REPLACEMENT_SECONDS", 3.0)
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        if step.event == "committed" and step.part == 1 and len(nodes.nodes) == 2:
            nodes.cluster.remove_node(nodes.nodes.pop(), allow_graceful=False)

    with connect(nodes.address):
        assert run(tmp_path / "run", report) == expected
    assert len(nodes.nodes) == 1
    assert any(step.event == "lost" for step in steps)
    [fewer] = [step for step in steps if step.event == "fewer"]
    assert "1 of 2 workers" in fewer.text
    committed = [step.part for step in steps if step.event == "committed"]
    assert sorted(set(committed)) == list(range(NUM_BLOCKS + 1))


def test_a_node_that_is_replaced_is_waited_for(
    nodes: Fleet, expected: dict[str, bytes], tmp_path: Path
) -> None:
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        if step.event == "committed" and step.part == 1:
            nodes.cluster.remove_node(nodes.nodes.pop(), allow_graceful=False)
            nodes.fill()

    with connect(nodes.address):
        assert run(tmp_path / "run", report) == expected
    assert any(step.event == "lost" for step in steps)
    assert not any(step.event == "fewer" for step in steps)


@pytest.mark.timeout(600)  # those of which Ray says nothing are noticed after 10 to 15 s each
def test_lost_messages_change_nothing(expected: dict[str, bytes], tmp_path: Path) -> None:
    given = planned("gptq")
    assert given.windows is not None
    (tmp_path / "plan.json").write_bytes(given.plan.to_json())
    (tmp_path / "windows").write_bytes(given.windows.to_bytes())
    output = tmp_path / "run"
    events = run_lossy(tmp_path / "plan.json", tmp_path / "windows", source(), output, attempts=5)
    assert lasting(open_store(str(output))) == expected
    # Lost calls are repeated; hardly any block is started again for them.
    assert events.count("lost") <= 2


def test_nodes_that_come_late_are_waited_for_and_no_longer(
    nodes: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTFLEET_NODE_PATIENCE", "20")
    for node in nodes.nodes:
        nodes.cluster.remove_node(node)
    nodes.nodes.clear()
    spec, more = (ComputeSpec(workers=n, threads=1, device="cpu") for n in (2, 3))
    with connect(nodes.address):
        with ThreadPoolExecutor(1) as pool:  # nodes can be started by the main thread alone
            chosen = pool.submit(allocate_on_cluster, spec)
            time.sleep(3.0)
            assert not chosen.done()
            nodes.fill()
            assert (chosen.result().workers, chosen.result().threads) == (2, 1)
        monkeypatch.setenv("QUANTFLEET_NODE_PATIENCE", "1")
        with pytest.raises(ExecutorError, match=r"did not get nodes for them within 1 s"):
            allocate_on_cluster(more)
        monkeypatch.delenv("QUANTFLEET_NODE_PATIENCE")
        with pytest.raises(ExecutorError, match="do not fit"):
            allocate_on_cluster(more)


def test_a_cluster_without_its_head_is_given_up_in_order_and_the_run_resumes_on_another(
    cluster: RunningCluster, tmp_path: Path
) -> None:
    """Workers are stopped too: else so small a run ends well without a head."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe("gptq").to_dict()))
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    log = tmp_path / "drivers.log"
    with fleet() as nodes:
        assert start(tmp_path, whole, nodes.address).wait() == 0
        log.unlink()
        driver = start(tmp_path, cut, nodes.address, before=_SOON_WITHOUT_HEAD)
        store = open_store(cut)
        while not any(store.list("records/")):
            time.sleep(0.05)
        workers = nodes.workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        [head] = nodes.cluster.head_node.all_processes["gcs_server"]
        head.process.kill()
        head.process.wait()
        try:
            assert driver.wait(120) == 3
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
    assert "the head of the Ray cluster at" in log.read_text()
    assert f"quantfleet resume {cut}" in log.read_text()
    assert start(tmp_path, cut, cluster.address).wait() == 0
    assert left(cut) == left(whole)
