"""Workers of a pass over a catalog, which stay for the next run on the same source.

Starting Ray, importing Keras, hashing a source and cutting texts take about as long as a small run,
and the recipes of one model share all of it. Runs on another source get processes of their own, so
that what one worker ever holds is what a run of its model was said to take.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.execute import Compute, OpenCompute
from pipeline.executor.protocol import ComputeSpec


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Workers that wait for a run.

    Attributes:
        stack: ends them.
    """

    spec: ComputeSpec
    source_url: str
    compute: Compute
    stack: contextlib.ExitStack

    def fit(self, spec: ComputeSpec, source_url: str) -> bool:
        """Whether a run would get the same workers."""
        asked = spec, self.spec
        if not self.compute.allocation.gpus:
            asked = (
                dataclasses.replace(spec, one_gpu_each=False),
                dataclasses.replace(self.spec, one_gpu_each=False),
            )
        all_there = self.compute.executor.num_workers == self.compute.allocation.workers
        return asked[0] == asked[1] and source_url == self.source_url and all_there


class KeptWorkers:
    """Opens what runs compute with, one after another (see `kept_workers`)."""

    def __init__(self, open_compute: OpenCompute) -> None:
        self._open_compute = open_compute
        self._kept: _Kept | None = None

    @contextlib.contextmanager
    def open_compute(self, spec: ComputeSpec, source_url: str, run_url: str) -> Iterator[Compute]:
        """Provide workers for a run for the block, new ones or those of the run before.

        A run that fails takes its workers with it: whatever state they are in helps no other.
        """
        with contextlib.ExitStack() as stack:
            kept, self._kept = self._kept, None
            if kept is not None:
                stack.push(kept.stack)
                if kept.fit(spec, source_url):
                    compute = kept.compute.for_next_run(run_url)
                else:
                    stack.close()
                    kept = None
            if kept is None:
                compute = stack.enter_context(self._open_compute(spec, source_url, run_url))
            yield compute
            if compute.has_workers:
                self.close()  # of a run inside this one
                self._kept = _Kept(
                    spec=spec, source_url=source_url, compute=compute, stack=stack.pop_all()
                )

    def close(self) -> None:
        """End the workers that wait."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.stack.close()


@contextlib.contextmanager
def kept_workers(open_compute: OpenCompute) -> Iterator[OpenCompute]:
    """Keep workers between the runs of the block.

    Args:
        open_compute: opens new ones.
    """
    workers = KeptWorkers(open_compute)
    try:
        yield workers.open_compute
    finally:
        workers.close()
