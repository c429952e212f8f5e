"""Nodes that are not there yet: ask the cluster's autoscaler for them, and wait."""

from __future__ import annotations

import os
import time

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.crew import CrewError

PATIENCE_VARIABLE = "QUANTFLEET_NODE_PATIENCE"
"""Environment variable: seconds to wait for nodes that a run needs; 0, or unset, for none."""
_LOOK_SECONDS = 2.0


def await_nodes(workers: int | None, threads: int | None, *, gpu: bool) -> None:
    """Ask for room for so many workers, where the environment says that nodes may yet come.

    Args:
        workers, threads: as the user said; None asks for one.
        gpu: one for each worker.

    Raises:
        CrewError: they did not come in time, or the patience is no number of seconds.
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
                raise CrewError(
                    f"{wanted} workers need {bundle} each, and the cluster did not get nodes for "
                    f"them within {patience:g} s; raise {PATIENCE_VARIABLE}, or look at the "
                    "autoscaler's limits with ray status"
                )
            time.sleep(_LOOK_SECONDS)
    finally:
        # From now on the workers themselves say what is needed.
        request_resources(bundles=[])


def _room(bundle: dict[str, float]) -> int:
    """Workers that fit the nodes which are there, whatever else they do."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(min(have.get(name, 0.0) // amount for name, amount in bundle.items())) for have in nodes
    )


def _patience_seconds() -> float:
    given = os.environ.get(PATIENCE_VARIABLE, "0")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise CrewError(f"{PATIENCE_VARIABLE} must be a number of seconds, not {given!r}")
    return seconds
