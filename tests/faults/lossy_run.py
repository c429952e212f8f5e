"""A run on a cluster that loses messages, in a process of its own.

    python -m tests.faults.lossy_run PLAN WINDOWS SOURCE OUTPUT

Ray itself may not start where messages are lost: its processes, or this one, then end early. So the
process tells what it has reached, a line each: "started", then "ended" and the run's events.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path

from pipeline.executor.allocation import NodeResources
from pipeline.executor.protocol import Allocation
from pipeline.executor.ray_cluster import connect
from pipeline.executor.ray_executor import RayExecutor
from pipeline.plan import Plan
from pipeline.remote_planning import start_worker
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.storage.object_store import open_store
from tests.integration.ray_cluster import quiet_environment

ROOT = Path(__file__).parents[2]
# Of each message: 5 in 100 requests, 5 answers, and 5 that are carried out meanwhile.
_LOSSES = (
    '{"*":{"num_failures":-1,"req_failure_prob":5,"resp_failure_prob":5,'
    '"in_flight_failure_prob":5}}'
)


def run_lossy(plan: Path, windows: Path, source: Path, output: Path, *, attempts: int) -> list[str]:
    """Carry a plan out by two workers; the names of the run's events.

    Args:
        attempts: to start Ray. Of the run itself there is one.
    """
    arguments = [str(path) for path in (plan, windows, source, output)]
    for _ in range(attempts):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.lossy_run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=quiet_environment() | {"RAY_testing_rpc_failure": _LOSSES},
            cwd=ROOT,
        )
        assert process.stdout is not None
        reached: dict[str, list[str]] = {}
        try:
            # Ray, too, may print lines; and its end, of which messages are lost as well, may not
            # come by itself.
            while "ended" not in reached and (line := process.stdout.readline()):
                first, *rest = line.split() or [""]
                reached[first] = rest
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()  # Ray's processes, which it has started, end with it
            process.stdout.close()
            process.wait()
        if "ended" in reached:
            return reached["ended"]
        if "started" in reached:
            raise RuntimeError("the run did not end well; its messages are above")
    raise RuntimeError(f"Ray did not start in {attempts} attempts; its messages are above")


def main(plan_file: str, windows_file: str, source: str, output: str) -> None:
    steps: list[Step] = []
    with connect(None, NodeResources(cpus=2)):
        print("started", flush=True)
        store = open_store(output)
        plan = claim(
            store, Plan.from_json(Path(plan_file).read_bytes()), Path(windows_file).read_bytes()
        )
        executor = RayExecutor(
            Allocation(workers=2, threads=1), partial(start_worker, source, output)
        )
        quantize(plan, store, executor, steps.append, keep_every=1)
        print("ended", *(step.event for step in steps), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
