"""Where a command computes: a cluster that it joins or starts, and what it takes of that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from jobs.logging import route_to_root
from jobs.termination import terminable
from pipeline.executor.ray_cluster import Resources, choose_resources
from pipeline.executor.ray_executor import joined


@contextlib.contextmanager
def computing(
    address: str | None, workers: int | None, threads: int | None, *, device: str
) -> Iterator[Resources]:
    """Join the cluster at `address` for the time of the block, or start one on this machine.

    SIGTERM ends the block in order.

    Args:
        workers, threads: None lets the cluster decide.
        device: "auto", "cpu" or "gpu".

    Raises:
        ExecutorError: there is no cluster, or more is asked than it has.
    """
    route_to_root("ray")
    wanted = None
    if address is None and workers is not None:
        wanted = max(workers * (threads or 1), len(os.sched_getaffinity(0)))
    with joined(address, wanted), terminable():
        yield choose_resources(workers, threads, device=device)
