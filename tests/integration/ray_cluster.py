"""A Ray cluster in a process of its own, shared by all tests of a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NUM_CPUS = 8
"""Logical ones: enough for four workers, whatever the machine has."""

# Reading ends when the pipe closes, be it by kill -9 of the parent.
_CLUSTER = """
import sys
import ray
from pipeline.executor.allocation import NodeResources
from pipeline.executor.ray_cluster import connect
with connect(None, NodeResources(cpus=int(sys.argv[1]))):
    folder = ray._private.worker._global_node.get_session_dir_path()
    print("cluster", ray.get_runtime_context().gcs_address, folder, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class RunningCluster:
    """Where it is, and the folder of its logs."""

    address: str
    session_folder: Path


@contextmanager
def serve_ray(environment: dict[str, str] | None = None) -> Iterator[RunningCluster]:
    """Args: environment: variables of all its processes, beside this one's."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER, str(NUM_CPUS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet_environment() | (environment or {}),
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Ray, too, may print lines.
        lines = (line.split() for line in process.stdout)
        found = next((words for words in lines if words[:1] == ["cluster"]), None)
        if found is None:
            raise RuntimeError("Ray did not start; its messages are above")
        yield RunningCluster(found[1], Path(found[2]))
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


def quiet_environment() -> dict[str, str]:
    """What `connect` sets, for processes that connect to a cluster started by it."""
    wanted = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "KERAS_BACKEND": "jax"}
    return {**os.environ, **wanted}
