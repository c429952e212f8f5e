"""Where runs compute: what a run needs of a cluster, and who works there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from jobs.catalog.request import Needs
from jobs.computing import computing
from pipeline.executor.protocol import Executor
from pipeline.executor.ray_cluster import Resources, memory_of_nodes
from pipeline.executor.ray_executor import RayExecutor


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A cluster that was joined.

    Attributes:
        resources: what the run gets of it.
        nodes: of each node, how many workers it may run, and bytes of memory for them.
        hire: starts workers for a source's and a run's URL.
    """

    resources: Resources
    nodes: tuple[tuple[int, int], ...]
    hire: Callable[[str, str], Executor]


Enter = Callable[[Needs], AbstractContextManager[Workplace]]
"""Joins a cluster for the time of one run."""


def on_ray(address: str | None) -> Enter:
    """Join the Ray cluster at an address, or start one on this machine for each run."""

    @contextlib.contextmanager
    def enter(needs: Needs) -> Iterator[Workplace]:
        with computing(address, needs.workers, needs.threads, device=needs.device) as resources:
            nodes = memory_of_nodes(resources)
            if needs.memory_bytes is not None:
                limit = needs.memory_bytes
                nodes = [(workers, min(memory, workers * limit)) for workers, memory in nodes]
            yield Workplace(
                resources=resources,
                nodes=tuple(nodes),
                hire=lambda source_url, run_url: RayExecutor(resources, source_url, run_url),
            )

    return enter
