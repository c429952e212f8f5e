"""A Ray head with its dashboard and token authentication, in processes of its own."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4

# Reading ends when the pipe closes, be it by kill -9 of the parent.
_HEAD = """
import json, sys
import ray
from ray._private.utils import write_ray_address
folder = sys.argv[3]
node = ray.init(
    address="local", include_dashboard=True, dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[1]), num_cpus=int(sys.argv[2]), log_to_driver=False,
    logging_level="ERROR", _temp_dir=folder,
)
# As `ray start` does: a job looks there for its cluster, and there may be others on this machine.
write_ray_address(ray.get_runtime_context().gcs_address, folder)
folder = ray._private.worker._global_node.get_session_dir_path()
print(json.dumps({"url": node.dashboard_url, "folder": folder}), flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass(frozen=True)
class Head:
    """Where its dashboard is, the folder of its logs, and the environment to reach it with."""

    address: str
    session_folder: Path
    environment: dict[str, str]


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Sockets lie in it, whose paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD, str(port), str(num_cpus), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=wanted,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        address = f"http://127.0.0.1:{port}"
        _wait_for_agents(address)
        yield Head(address, Path(said["folder"]), wanted)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_agents(address: str) -> None:
    """A job needs an agent on some node, which starts a little later than the dashboard."""
    request = urllib.request.Request(
        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    for _ in range(120):
        refusals = contextlib.suppress(urllib.error.URLError, ConnectionError)
        with refusals, urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise TimeoutError("the dashboard does not answer")


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
