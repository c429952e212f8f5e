"""Kill drivers, workers and nodes of real runs at random, and compare what is left in the end.

    python -m tests.faults.random_kills --kills 100 --seed 0 [--endpoint URL]

A Ray cluster of a head without CPUs and two nodes with one worker each; a tiny model; SIGKILL. Each
run is started again, with the command that a user would give, until it ends; then every object but
leases, events and caches must be what an undisturbed run leaves. Meanwhile a reader polls the run
and checks all that its manifest promises. What is killed when, in units of an undisturbed run, is
drawn from the seed; what exactly that hits is the machine's doing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import MissingObjectError
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import open_store
from tests.pipeline.tiny_runs import NUM_BLOCKS, recipe, source

ROOT = Path(__file__).parents[2]
# Leases, events and caches: what differs between executions, or may be missing.
# The report is of what happened: when, and by which drivers and workers.
PASSING = ("events/", "activations/", "quarantine/", "leases/", "report.html")
TARGETS = ("driver", "worker", "node")
# Of an undisturbed run's time: some runs end unharmed, and most are hit more than once.
_SHORTEST_DELAY, _LONGEST_DELAY = 0.05, 1.25
_LONGEST_RUN_SECONDS = 900.0
_QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}


@dataclass
class Fleet:
    """A cluster whose nodes can be shot, and come back."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def fill(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20))

    def kill_node(self, rng: random.Random) -> bool:
        if not self.nodes:
            return False
        node = self.nodes.pop(rng.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        return True

    def workers(self) -> list[int]:
        """Process ids of this cluster's workers, and of no other's."""
        raylets = {info.process.pid for node in self.nodes for info in node.all_processes["raylet"]}
        return sorted(pid for pid in _actors() if _parent(pid) in raylets)

    def kill_worker(self, rng: random.Random) -> bool:
        workers = self.workers()
        if not workers:
            return False
        os.kill(rng.choice(workers), signal.SIGKILL)
        return True


def _actors() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if command.startswith(b"ray::_WorkerAct"):
                found.append(int(entry.name))
    return found


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        # Its dashboard, which nobody asks, would be ten processes more that import half of Ray.
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": _QUICK_TO_NOTICE,
        },
    )
    found = Fleet(cluster)
    try:
        found.fill()
        yield found
    finally:
        cluster.shutdown()
        gc.collect()  # Ray leaves sockets to the collector, which warns whoever is there then


@contextlib.contextmanager
def reader(url: str) -> Iterator[Counter[str]]:
    """Poll a run as its users do; what a manifest promises must be there whenever it is."""
    seen: Counter[str] = Counter()
    ended = threading.Event()

    def read() -> None:
        store = open_store(url)
        while not ended.wait(0.2):
            try:
                found = damaged_files(store, read_manifest(store))
            except MissingObjectError:
                seen["unfinished"] += 1
            else:
                seen["broken" if found else "finished"] += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


@dataclass
class Tally:
    """What happened over all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    different: list[str] = field(default_factory=list)
    broken: int = 0
    again: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def start(work: Path, output: str, address: str, *, before: str = "") -> subprocess.Popen[bytes]:
    """Args: before: statements that the driver executes before the command."""
    program = f"{before}\nfrom jobs.cli.main import main\nmain()"
    with (work / "drivers.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-c", program, "quantize", str(source())),
                *("--recipe", str(work / "recipe.yaml"), "--output", output),
                *("--address", address, "--workers", "2", "--threads", "1"),
                *("--keep-every", "1", "--lease-seconds", "6"),
            ],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        )


def disturbed(
    work: Path,
    output: str,
    where: Fleet,
    rng: random.Random,
    tally: Tally,
    *,
    most: int,
    usual_seconds: float,
) -> None:
    """One run from its first start to its end, killed again and again.

    Args:
        most: kills over all runs.
        usual_seconds: that a run takes when nobody kills.
    """
    begun = time.monotonic()
    driver = start(work, output, where.address)
    # A driver whose own node was shot ends by itself, as one on a real cluster does.
    by_itself = 0
    while time.monotonic() - begun < _LONGEST_RUN_SECONDS:
        deadline = time.monotonic() + usual_seconds * rng.uniform(_SHORTEST_DELAY, _LONGEST_DELAY)
        target = rng.choice(TARGETS)
        while time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.05)
        where.fill()
        if driver.poll() is not None:
            if driver.returncode == 0:
                tally.seconds.append(time.monotonic() - begun)
                return
            by_itself += 1
            if by_itself > 3:
                raise RuntimeError(f"the driver ends by itself; see {work / 'drivers.log'}")
            driver = start(work, output, where.address)
            continue
        if tally.kills.total() >= most:
            continue
        if target == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            hit = True
            by_itself = 0
        else:
            hit = where.kill_node(rng) if target == "node" else where.kill_worker(rng)
            by_itself = 0
        tally.kills[target] += hit
    driver.kill()
    raise RuntimeError(f"{output} did not end in {_LONGEST_RUN_SECONDS:.0f} s")


def left(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key in store.list() if not key.startswith(PASSING)}


def commits_beyond_one(url: str) -> int:
    """Parts that were committed more than once, counting the times, by the runs' own events."""
    store = open_store(url)
    lines = [
        json.loads(line)
        for key in store.list("events/")
        for line in store.get(key).decode().splitlines()
    ]
    return sum(line["event"] == "committed" for line in lines) - (NUM_BLOCKS + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="a URL to run below; default: a temporary folder")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="random-kills-"))
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe("gptq").to_dict()))
    base = arguments.output or str(work)
    tally = Tally()
    rng = random.Random(arguments.seed)
    with fleet() as where:
        expected_url = f"{base}/undisturbed"
        begun = time.monotonic()
        driver = start(work, expected_url, where.address)
        assert driver.wait(_LONGEST_RUN_SECONDS) == 0, (work / "drivers.log").read_text()[-3000:]
        usual_seconds = time.monotonic() - begun
        print(f"undisturbed: {usual_seconds:.0f} s", flush=True)
        expected = left(expected_url)
        assert MANIFEST_KEY in expected
        while tally.kills.total() < arguments.kills:
            url = f"{base}/run-{tally.runs:03d}"
            before = tally.kills.total()
            with reader(url) as seen:
                disturbed(
                    work,
                    url,
                    where,
                    rng,
                    tally,
                    most=arguments.kills,
                    usual_seconds=usual_seconds,
                )
            tally.runs += 1
            tally.broken += seen["broken"]
            tally.again.append(commits_beyond_one(url))
            found = left(url)
            if found != expected:
                keys = {*found, *expected}
                tally.different += [k for k in sorted(keys) if found.get(k) != expected.get(k)]
            killed = tally.kills.total() - before
            print(
                f"{url}: {killed} kills, {tally.again[-1]} parts committed again, "
                f"{tally.seconds[-1]:.0f} s, same bytes: {found == expected}, reader: {dict(seen)}",
                flush=True,
            )
    print(
        f"{tally.runs} runs, {tally.kills.total()} kills {dict(tally.kills)}; objects that differ: "
        f"{tally.different or 'none'}; half-published results seen: {tally.broken}; parts "
        f"committed again: {sum(tally.again)}"
    )
    shutil.rmtree(work)
    sys.exit(bool(tally.different or tally.broken))


if __name__ == "__main__":
    main()
