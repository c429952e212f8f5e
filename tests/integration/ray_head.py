"""A Ray head with its dashboard and token authentication, and nodes that join it, each in processes
of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4

# Reading ends when the pipe closes, be it by kill -9 of the parent.
_TIED = """
import subprocess, sys
quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *sys.argv[1:]]
process = subprocess.Popen(command, **quiet)
sys.stdin.read()
process.terminate()  # it ends the node's other processes
process.wait()
"""


@dataclass(frozen=True)
class Head:
    """Where its dashboard is and where nodes find it, its logs, and the environment to reach it."""

    address: str
    gcs_address: str
    session_folder: Path
    environment: dict[str, str]

    def ask(self, path: str) -> Any:
        """What the dashboard answers."""
        with urllib.request.urlopen(_request(f"{self.address}/{path}"), timeout=30) as answer:
            return json.load(answer)

    def _state_of(self, kind: str) -> list[dict[str, Any]]:
        found = self.ask(f"api/v0/{kind}?detail=1&limit=1000")["data"]["result"]["result"]
        return list(found)

    def state_of_node(self, name: str) -> str:
        """What the cluster itself says: ALIVE or DEAD; "" of one that never joined."""
        states = [node["state"] for node in self._state_of("nodes") if node["node_name"] == name]
        return str(states[-1]) if states else ""

    def nodes_of_job(self, submission_id: str) -> list[str]:
        """Names of the nodes where workers of a job's driver live now."""
        job = self.ask(f"api/jobs/{submission_id}")["job_id"]
        names = {node["node_id"]: node["node_name"] for node in self._state_of("nodes")}
        return [
            names[actor["node_id"]]
            for actor in self._state_of("actors")
            if (actor["job_id"], actor["state"]) == (job, "ALIVE")
            and actor["class_name"] == "_WorkerActor"
        ]


@contextlib.contextmanager
def serve_head(num_cpus: int, environment: dict[str, str]) -> Iterator[Head]:
    """Args: environment: of all its processes, beside this one's."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    wanted = {
        **os.environ,
        **environment,
        **token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "KERAS_BACKEND": "jax",
        # Jobs find the command there, and the packages where this process does.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    # Sockets lie in it, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    dashboard_port, port = _free_ports()
    try:
        with _started(
            wanted,
            *("--head", f"--port={port}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        ):
            address = f"http://127.0.0.1:{dashboard_port}"
            await_that(lambda: _answers(address), "the dashboard's answer")
            # It is written last; jobs look there for their cluster.
            known = folder / "ray_current_cluster"
            await_that(known.exists, "the end of the head's start")
            gcs_address = known.read_text().strip()
            yield Head(address, gcs_address, (folder / "session_latest").resolve(), wanted)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(environment: dict[str, str], *options: str) -> Iterator[None]:
    process = subprocess.Popen(
        # The port of agents that is usual may be another cluster's on this machine.
        [sys.executable, "-c", _TIED, "--dashboard-agent-listen-port=0", *options],
        stdin=subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def _answers(address: str) -> bool:
    refusals = contextlib.suppress(urllib.error.URLError, ConnectionError)
    with refusals, urllib.request.urlopen(_request(f"{address}/api/jobs/"), timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _request(url: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})


@dataclass(frozen=True)
class Node:
    """A node that joined: its name, and the number of its raylet's process."""

    name: str
    raylet: int


@contextlib.contextmanager
def serve_node(head: Head, name: str, num_cpus: int) -> Iterator[Node]:
    """Join a head, as another machine would."""
    given = f"--address={head.gcs_address}", f"--node-name={name}", f"--num-cpus={num_cpus}"
    with _started(head.environment, *given, f"--object-store-memory={100 << 20}"):
        await_that(lambda: head.state_of_node(name) == "ALIVE", f"{name} to join")
        [raylet] = [
            process
            for process in processes_of(f"--node-name={name}")
            if Path(f"/proc/{process}/exe").resolve().name == "raylet"
            and process in processes_of(head.gcs_address)
        ]
        yield Node(name, raylet)


def await_that(holds: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Raises: TimeoutError: it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def processes_of(fragment: str) -> list[int]:
    """Numbers of the processes in whose command line a fragment occurs, this one's aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if fragment in command:
                    found.append(int(entry.name))
    return found


def kill(process: int) -> None:
    """As an accident would."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
