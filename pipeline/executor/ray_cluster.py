"""This process's connection to a Ray cluster: its nodes, its head, and its metrics."""

from __future__ import annotations

import contextlib
import os
import socket
import string
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from ray.autoscaler.sdk import request_resources
from ray.util import metrics

from pipeline.executor.allocation import NodeResources, allocate
from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError
from pipeline.executor.ray_room import cannot_start, usable_folder

ACCELERATOR_PREFIX = "accelerator_type:"
"""Of the resource by which Ray 2.60 names the kind of a node's GPUs."""
ACCELERATOR_AMOUNT = 0.001
"""What an actor of a kind takes of that resource, of which each such node has 1."""
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
        ExecutorError: there is no cluster at the address, it is a Ray Client's, or this machine has
            no room for one.
    """
    if address is not None and address.startswith("ray://"):
        raise ExecutorError(
            f"{address}: a Ray Client cannot drive a run; on a machine of the cluster say "
            "--address auto, from elsewhere send the run as a job with quantfleet submit"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of calls that are cancelled; errors that matter are fetched.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Nobody else knows the ports, and Ray would leave a token file in the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {
            "address": "local",
            "_temp_dir": str(usable_folder()),
            "include_dashboard": False,
            # Workers start with an environment of their own; those started before would idle.
            "_system_config": {
                "enable_worker_prestart": False,
                "prestart_worker_first_driver": False,
            },
        }
        if machine is not None:
            options |= {"num_cpus": machine.cpus, "_memory": machine.memory_bytes or None}
    else:
        if address.rpartition(":")[2].isdigit():
            try:
                # Ray itself would wait for minutes, and fill the terminal meanwhile.
                _connect_once(address, timeout=10)
            except OSError as error:
                raise _no_cluster(address, str(error)) from None
        options |= {"address": address}
    try:
        try:
            # Workers import from this folder first; in the caller's a "pipeline" of theirs may lie.
            with contextlib.chdir(_CODE):
                ray.init(**options)
        except Exception as error:  # Ray raises that very class, too
            reason = " ".join(str(error).split())
            refused = cannot_start(reason) if address is None else _no_cluster(address, reason)
            raise refused from error
        yield
    finally:
        ray.shutdown()


def _no_cluster(address: str, reason: str) -> ExecutorError:
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
        """Connect every few seconds; ExecutorError once it has been away for half a minute."""
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


NODE_PATIENCE_VARIABLE = "QUANTFLEET_NODE_PATIENCE"
"""Environment variable: seconds to wait for nodes that a run needs; 0, or unset, for none."""
_POLL_SECONDS = 2.0


def allocate_on_cluster(spec: ComputeSpec) -> Allocation:
    """Choose workers on the nodes of the connected cluster.

    If the environment says to wait for nodes, the autoscaler is first asked for room for the
    workers, or for one where the user names no number.

    Raises:
        ExecutorError: the cluster has less than is asked for, or does not get it in time; or the
            patience is no number of seconds.
    """
    patience = _patience_seconds()
    bundle = {"CPU": float(spec.threads or 1)} | (
        {"GPU": float(spec.gpus_per_worker or 1)} if spec.device == "gpu" else {}
    )
    if spec.device == "gpu" and spec.accelerator is not None:
        bundle |= {f"{ACCELERATOR_PREFIX}{spec.accelerator}": ACCELERATOR_AMOUNT}
    wanted = spec.workers or 1
    if patience and _room(bundle) < wanted:
        request_resources(bundles=[bundle] * wanted)
        try:
            deadline = time.monotonic() + patience
            while _room(bundle) < wanted:
                if time.monotonic() > deadline:
                    raise ExecutorError(
                        f"{wanted} workers need {bundle} each, and the cluster did not get nodes "
                        f"for them within {patience:g} s; raise {NODE_PATIENCE_VARIABLE}, or look "
                        "at the autoscaler's limits with ray status"
                    )
                time.sleep(_POLL_SECONDS)
        finally:
            # From now on the workers themselves say what is needed.
            request_resources(bundles=[])
    nodes = [
        NodeResources(
            cpus=int(resources.get("CPU", 0)),
            gpus=int(resources.get("GPU", 0)),
            memory_bytes=int(resources.get("memory", 0)),
            accelerator=_accelerator(resources),
        )
        for resources in _live_nodes()
    ]
    return allocate(spec, nodes)


def _accelerator(resources: dict[str, float]) -> str:
    """The kind of a node's GPUs; Ray takes all of one node for alike."""
    names = (name for name in sorted(resources) if name.startswith(ACCELERATOR_PREFIX))
    return next(names, "").removeprefix(ACCELERATOR_PREFIX)


def _live_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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


_counter, _gauge = cache(metrics.Counter), cache(metrics.Gauge)


def increase_counter(name: str, description: str, amount: float, tags: dict[str, str]) -> None:
    """Add to a Prometheus counter, which Ray exports as `ray_<name>`."""
    _counter(name, description, tuple(tags)).inc(amount, _ascii(tags))


def set_gauge(name: str, description: str, value: float, tags: dict[str, str]) -> None:
    """Set a Prometheus gauge, which Ray exports as `ray_<name>`."""
    _gauge(name, description, tuple(tags)).set(value, _ascii(tags))


def _ascii(tags: dict[str, str]) -> dict[str, str]:
    """Tags as Ray can record them: other characters as in a URL, %E3%81%82."""
    return {
        # File names may hold bytes that are not UTF-8, which Python keeps as surrogates.
        name: quote(value, safe=string.printable, errors="surrogateescape")
        for name, value in tags.items()
    }
