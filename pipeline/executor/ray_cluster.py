"""This process's connection to a Ray cluster: its nodes, its head, and its metrics."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.autoscaler.sdk import request_resources
from ray.util import metrics

from pipeline.executor.allocation import NodeResources, allocate
from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError

_CODE = Path(__file__).parents[2]
_CHECK_SECONDS = 5.0
_HEAD_SECONDS = 30.0
"""How long the head may be away. After twice that, Ray ends this process without a message."""


@contextlib.contextmanager
def connect(address: str | None, machine: NodeResources | None = None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine, for the block.

    Args:
        address: as `ray.init` takes it; None starts a cluster of this machine alone.
        machine: logical resources of a cluster that is started; None for what the machine has.

    Raises:
        ExecutorError: there is no cluster at the address, or it is a Ray Client's.
    """
    if address is not None and address.startswith("ray://"):
        raise ExecutorError(
            f"{address}: a Ray Client cannot drive a run; on a machine of the cluster say "
            "--address auto, from elsewhere send the run as a job with quantfleet submit"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of calls that are cancelled; errors that matter are fetched.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
    }
    if address is None:
        # A cluster of this process alone: nobody else knows its ports, and Ray would otherwise
        # leave a token file in the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {
            "address": "local",
            "include_dashboard": False,
            # Workers start with an environment of their own: those that wait for any would idle.
            "_system_config": {
                "enable_worker_prestart": False,
                "prestart_worker_first_driver": False,
            },
        }
        if machine is not None:
            options |= {"num_cpus": machine.cpus, "_memory": machine.memory_bytes or None}
    else:
        _check_port(address)
        options |= {"address": address}
    # Ray installs a handler of its own, which would end the process out of order.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Ray puts this folder before all others that workers import from. Were it the caller's, a
        # folder of theirs named "pipeline" would be taken for this package.
        with contextlib.chdir(_CODE):
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise _no_cluster(address, reason) from None
    try:
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Connect once: Ray itself would wait for minutes, and fill the terminal meanwhile."""
    if not address.rpartition(":")[2].isdigit():
        return
    try:
        _connect_once(address, timeout=10)
    except OSError as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str | None, reason: str) -> ExecutorError:
    return ExecutorError(
        f"no Ray cluster at {address}: {reason}; check --address, or leave it out to start one "
        "on this machine"
    )


def _connect_once(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()


class GcsMonitor:
    """Notices when the head of the cluster (its GCS, global control service) is lost."""

    def __init__(self) -> None:
        self._address = str(ray.get_runtime_context().gcs_address)
        self._checked = time.monotonic()
        self._away_since: float | None = None

    def check(self) -> None:
        """Connect to it, every few seconds.

        Raises:
            ExecutorError: it has been away for half a minute.
        """
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        try:
            _connect_once(self._address, timeout=_CHECK_SECONDS)
        except OSError as error:
            if self._away_since is None:
                self._away_since = now
            if now - self._away_since > _HEAD_SECONDS:
                raise ExecutorError(
                    f"the head of the Ray cluster at {self._address} has been away for "
                    f"{now - self._away_since:.0f} s ({error}); start it again, or another "
                    "cluster, then resume"
                ) from None
        else:
            self._away_since = None


def allocate_on_cluster(spec: ComputeSpec) -> Allocation:
    """Choose workers on the nodes of the connected cluster.

    Raises:
        ExecutorError: the cluster has less than is asked for, or does not get it in time (see
            `await_nodes`).
    """
    await_nodes(spec.workers, spec.threads, gpu=spec.device == "gpu")
    return allocate(
        spec,
        [
            NodeResources(
                cpus=int(resources.get("CPU", 0)),
                gpus=int(resources.get("GPU", 0)),
                memory_bytes=int(resources.get("memory", 0)),
            )
            for resources in _live_nodes()
        ],
    )


def _live_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


NODE_PATIENCE_VARIABLE = "QUANTFLEET_NODE_PATIENCE"
"""Environment variable: seconds to wait for nodes that a run needs; 0, or unset, for none."""
_POLL_SECONDS = 2.0


def await_nodes(workers: int | None, threads: int | None, *, gpu: bool) -> None:
    """Ask the autoscaler for room for so many workers, if the environment says to wait for nodes.

    Args:
        workers, threads: as the user said; None asks for one.
        gpu: one for each worker.

    Raises:
        ExecutorError: they did not come in time, or the patience is no number of seconds.
    """
    patience = _patience_seconds()
    bundle = {"CPU": float(threads or 1)} | ({"GPU": 1.0} if gpu else {})
    wanted = workers or 1
    if not patience or _room(bundle) >= wanted:
        return
    request_resources(bundles=[bundle] * wanted)
    try:
        deadline = time.monotonic() + patience
        while _room(bundle) < wanted:
            if time.monotonic() > deadline:
                raise ExecutorError(
                    f"{wanted} workers need {bundle} each, and the cluster did not get nodes for "
                    f"them within {patience:g} s; raise {NODE_PATIENCE_VARIABLE}, or look at the "
                    "autoscaler's limits with ray status"
                )
            time.sleep(_POLL_SECONDS)
    finally:
        # From now on the workers themselves say what is needed.
        request_resources(bundles=[])


def _room(bundle: dict[str, float]) -> int:
    """Workers that fit the nodes, whatever else is running on them."""
    return sum(
        int(min(have.get(name, 0.0) // amount for name, amount in bundle.items()))
        for have in _live_nodes()
    )


def _patience_seconds() -> float:
    given = os.environ.get(NODE_PATIENCE_VARIABLE, "0")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ExecutorError(f"{NODE_PATIENCE_VARIABLE} must be a number of seconds, not {given!r}")
    return seconds


def increase_counter(name: str, description: str, amount: float, tags: dict[str, str]) -> None:
    """Add to a Prometheus counter, which Ray exports as `ray_<name>`."""
    _metric(metrics.Counter, name, description, tuple(tags)).inc(amount, tags)


def set_gauge(name: str, description: str, value: float, tags: dict[str, str]) -> None:
    """Set a Prometheus gauge, which Ray exports as `ray_<name>`."""
    _metric(metrics.Gauge, name, description, tuple(tags)).set(value, tags)


_Metric = TypeVar("_Metric", metrics.Counter, metrics.Gauge)


@cache
def _metric(
    metric: type[_Metric], name: str, description: str, tag_keys: tuple[str, ...]
) -> _Metric:
    return metric(name, description=description, tag_keys=tag_keys)
