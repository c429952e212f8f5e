"""This process as a part of a Ray cluster, for a while."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from pipeline.crew import CrewError

_CODE = Path(__file__).parents[1]
_ASK_SECONDS = 5.0
_HEAD_SECONDS = 30.0
"""How long a head may be away. After twice that, Ray ends this process without a word of ours."""


@contextlib.contextmanager
def joined(address: str | None, wanted_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine, for the time of the block.

    Args:
        address: as `ray.init` takes it; None starts a cluster of this machine alone.
        wanted_cpus: logical CPUs of a cluster that is started; None for what the machine has.

    Raises:
        CrewError: there is no cluster at the address, or it is a Ray Client's.
    """
    if address is not None and address.startswith("ray://"):
        raise CrewError(
            f"{address}: a Ray Client cannot drive a run; on a machine of the cluster say "
            "--address auto, from elsewhere send the run as a job with quantfleet submit"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of calls that are given up; what matters is asked for.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
    }
    if address is None:
        # A cluster of this process alone: nobody else has its ports' addresses, and Ray would
        # otherwise leave a token file in the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {"address": "local", "include_dashboard": False, "num_cpus": wanted_cpus}
    else:
        _check_that_somebody_listens(address)
        options |= {"address": address}
    try:
        # Ray puts this folder before all others that workers import from. Were it the caller's, a
        # folder of theirs named "pipeline" would be taken for this package.
        with contextlib.chdir(_CODE):
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise CrewError(
            f"no Ray cluster at {address}: {reason}; check --address, or leave it out to start one "
            "on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_somebody_listens(address: str) -> None:
    """Ray itself would wait for minutes, and fill the terminal meanwhile."""
    if not address.rpartition(":")[2].isdigit():
        return
    try:
        _knock(address, timeout=10)
    except OSError as error:
        raise CrewError(
            f"no Ray cluster at {address}: {error}; check --address, or leave it out to start one "
            "on this machine"
        ) from None


def _knock(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()


class Head:
    """The head of the cluster that this process has joined."""

    def __init__(self) -> None:
        self._address = str(ray.get_runtime_context().gcs_address)
        self._asked = time.monotonic()
        self._away_since: float | None = None

    def check(self) -> None:
        """Ask now and then whether it is there.

        Raises:
            CrewError: it has not been for half a minute.
        """
        now = time.monotonic()
        if now - self._asked < _ASK_SECONDS:
            return
        self._asked = now
        try:
            _knock(self._address, timeout=_ASK_SECONDS)
        except OSError as error:
            if self._away_since is None:
                self._away_since = now
            if now - self._away_since > _HEAD_SECONDS:
                raise CrewError(
                    f"the head of the Ray cluster at {self._address} has been away for "
                    f"{now - self._away_since:.0f} s ({error}); start it again, or another "
                    "cluster, then resume"
                ) from None
        else:
            self._away_since = None
