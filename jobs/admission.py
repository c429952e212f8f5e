"""Whether a run may start or go on here; asked before anything is done or written."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.quantities import size
from pipeline.errors import PipelineError
from pipeline.estimates import Estimate
from pipeline.executor.protocol import ExecutorError
from pipeline.plan import Plan
from pipeline.remote_planning import Identity


def check_memory(costs: Estimate, nodes: Sequence[tuple[int, int]]) -> None:
    """Refuse a run whose workers would not fit into the memory of their nodes.

    Args:
        nodes: of each node, how many workers it may run, and bytes of memory for them.

    Raises:
        ExecutorError: with what is needed, what there is, and what to do.
    """
    for workers, memory_bytes in nodes:
        if workers * costs.worker_bytes > memory_bytes:
            fitting = memory_bytes // costs.worker_bytes
            remedy = f"use --workers {fitting}, or" if fitting else "lower num_samples, or use"
            raise ExecutorError(
                f"too little memory: a worker needs about {size(costs.worker_bytes)}, and a node "
                f"that may run {workers} of them has {size(memory_bytes)}; {remedy} nodes with "
                "more memory"
            )


def check_identity(plan: Plan, found: Identity, source_url: str, *, finished: bool) -> None:
    """Refuse to go on with a run where it would give other bytes.

    Args:
        finished: no byte is still to be made, so only the source matters.

    Raises:
        PipelineError: with what changed, and what to do.
    """
    if found.source_files_sha256 != plan.source_files_sha256:
        raise PipelineError(
            f"{source_url}: the source changed since the run was planned: its JSON, vocabulary or "
            "the sizes of its weights files are others; put it back, or start a new run elsewhere"
        )
    now = {**found.machine, **found.versions}
    then = {**plan.machine, **plan.versions}
    other = [
        f"{name} {now.get(name)}, planned {then.get(name)}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
    ]
    if other and not finished:
        raise PipelineError(
            f"the run was planned for other machines or packages ({'; '.join(other)}), which "
            "round otherwise; go on where it was planned, or start a new run elsewhere"
        )
