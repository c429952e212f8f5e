"""Real drivers on a real cluster: two at once, one put to sleep, one told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.integration.ray_cluster import RunningCluster, quiet_environment
from tests.pipeline.tiny_runs import NUM_BLOCKS, recipe, source

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive]

ROOT = Path(__file__).parents[2]
LASTING = ("artifact/", "records/", "tokens/", "plan.json", "manifest.json")
TERM_SECONDS = 3.0


def start(
    folder: Path, output: Path, cluster: RunningCluster, *options: str
) -> subprocess.Popen[str]:
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe("gptq").to_dict()))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "jobs.cli.main", "quantize", str(source())),
            *("--recipe", str(recipe_file), "--output", str(output)),
            *("--address", cluster.address, "--workers", "1", "--threads", "1"),
            *("--keep-every", "1", "--lease-seconds", str(TERM_SECONDS), *options),
        ],
        cwd=ROOT,
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(driver: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    _, said = driver.communicate(timeout=200)
    assert driver.returncode == 0, said
    return said


def lasting(output: Path) -> dict[str, bytes]:
    store = open_store(str(output))
    return {key: store.get(key) for key in store.list() if key.startswith(LASTING)}


def wait_for(store: ObjectStore, prefix: str, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not store.list(prefix):
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def committed_times(output: Path) -> int:
    store = open_store(str(output))
    lines = [
        json.loads(line)
        for key in store.list("events/")
        for line in store.get(key).decode().splitlines()
    ]
    return sum(line["event"] == "committed" for line in lines)


@pytest.fixture(scope="module")
def undisturbed(
    cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    end(start(folder, folder / "run", cluster))
    return lasting(folder / "run")


def test_of_two_drivers_one_works_and_the_other_finds_it_done_and_who_does_not_wait_is_told(
    cluster: RunningCluster, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    drivers = [start(tmp_path, output, cluster) for _ in range(2)]
    wait_for(open_store(str(output)), "leases/00001.beat", drivers[0])
    third = start(tmp_path, output, cluster, "--no-wait")
    _, told = third.communicate(timeout=120)
    if third.returncode:  # else the first two were faster
        assert third.returncode == 3
        assert any(f"process {driver.pid} on " in told for driver in drivers), told
    said = [end(driver) for driver in drivers]
    assert lasting(output) == undisturbed
    assert committed_times(output) == NUM_BLOCKS + 1, said
    assert sum("finished before; nothing to quantize" in one for one in said) == 1, said


def test_a_driver_told_to_end_does_so_in_time_and_is_followed_at_once(
    cluster: RunningCluster, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    driver = start(tmp_path, output, cluster)
    store = open_store(str(output))
    wait_for(store, "records/", driver)
    driver.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, said = driver.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert driver.returncode == 143, said
    assert f"quantfleet resume {output}" in said
    assert "Traceback" not in said
    assert not store.exists(MANIFEST_KEY)
    assert json.loads(store.get("leases/00001.beat.json"))["released"] is True
    end(start(tmp_path, output, cluster))
    assert lasting(output) == undisturbed


def test_a_driver_that_slept_through_its_lease_stops_when_it_wakes(
    cluster: RunningCluster, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    sleeper = start(tmp_path, output, cluster)
    store = open_store(str(output))
    wait_for(store, "records/rest", sleeper)
    os.kill(sleeper.pid, signal.SIGSTOP)
    begun = time.monotonic()
    follower = start(tmp_path, output, cluster)
    wait_for(store, "leases/00002", follower)
    assert time.monotonic() - begun >= TERM_SECONDS
    os.kill(sleeper.pid, signal.SIGCONT)
    end(follower)
    _, said = sleeper.communicate(timeout=120)
    # Whichever comes first: it notices, or it finds nothing left to do.
    assert sleeper.returncode in (0, 3), said
    if sleeper.returncode == 3:
        assert "has taken the run over" in said
    assert lasting(output) == undisturbed
