"""The one way a run is driven, by `quantfleet quantize` as by `fulfil`: workers, checks, blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

from jobs.known_plan import KnownPlan
from jobs.logging import log_event, route_to_root, waiting
from jobs.metrics import RunMetrics
from jobs.progress.run import watch
from jobs.quantities import size
from jobs.room import (
    check_device_memory,
    check_memory,
    evaluation_pass,
    place_activations,
)
from jobs.shared_statistics import with_statistics
from jobs.summary import Summary
from pipeline.errors import PipelineError
from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.executor.allocation import allocate, may_have_gpu, this_machine
from pipeline.executor.local_process import LocalProcess, local_process
from pipeline.executor.protocol import (
    ActivationPlace,
    Allocation,
    ComputeSpec,
    DeviceMemory,
    Executor,
    FunctionRunner,
)
from pipeline.executor.work_spans import WorkSpan
from pipeline.executor.worker_environment import worker_environment
from pipeline.fidelity import Fidelity
from pipeline.plan import Plan
from pipeline.planning.estimates import Estimate, estimate
from pipeline.planning.evaluation_costs import EvaluationMemory
from pipeline.remote_planning import (
    Identity,
    found_device_memory,
    start_worker,
)
from pipeline.run import lease
from pipeline.run.claim import differences
from pipeline.run.commits import Finding, quarantine, read_manifest
from pipeline.run.driver import KEEP_EVERY, quantize
from pipeline.run.events import EventLog
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class DriverOptions:
    """How a run is driven; none of it changes its result.

    Attributes:
        keep_every: blocks between activations kept in storage, to resume from.
        wait: for another driver of the same run to end, rather than give up.
        lease_seconds: silence after which another driver is considered dead.
    """

    keep_every: int = KEEP_EVERY
    wait: bool = True
    lease_seconds: float = lease.TERM_SECONDS

    def acquire_lease(self, store: ObjectStore) -> lease.Lease:
        """Become the driver of the run at a store's root (see `lease.acquire`)."""
        return lease.acquire(
            store, seconds=self.lease_seconds, wait=self.wait, tell=partial(log_event, "waiting")
        )


class Compute:
    """What one run computes with (see `open_compute`): the allocated workers, once needed."""

    def __init__(
        self,
        allocation: Allocation,
        start_workers: Callable[[], Executor],
        planner: LocalProcess | None = None,
        *,
        peak_before: int = 0,
        known: KnownPlan | None = None,
    ) -> None:
        """Workers that may have computed other runs on the same source.

        Args:
            planner: plans beside the workers' start; None where a worker has to plan.
            peak_before: the most that any of them used of its GPU for another run.
            known: what they found out of the source.
        """
        self.allocation = allocation
        self.known = KnownPlan() if known is None else known
        self._start_workers = start_workers
        self._planner = planner
        self._peak_before = peak_before

    @cached_property
    def executor(self) -> Executor:
        return self._start_workers()

    @property
    def has_workers(self) -> bool:
        return "executor" in self.__dict__

    @cached_property
    def _gpus(self) -> list[DeviceMemory]:
        """What the workers' GPUs have, by their own account."""
        if not self.allocation.gpus:
            return []
        return self.executor.run_each(found_device_memory, [()] * self.executor.num_processes)

    def device_peak_bytes(self) -> int | None:
        """The most that any worker has used of its GPU for this run.

        None if there are none, or if they used as much for a run before, which devices do not tell
        apart.
        """
        if not self.allocation.gpus:
            return None
        found = self.executor.run_each(found_device_memory, [()] * self.executor.num_processes)
        peak = max((x.peak_bytes for x in found if x.peak_bytes is not None), default=0)
        return peak if peak > self._peak_before else None

    def for_next_run(self, run_url: str) -> Compute:
        """The same workers for another run on the same source."""
        executor = self.executor

        def go_on() -> Executor:
            executor.work_on(run_url)
            return executor

        return Compute(
            self.allocation,
            go_on,
            peak_before=max(self._peak_before, self.device_peak_bytes() or 0),
            known=self.known,
        )

    def estimate(self, plan: Plan) -> Estimate:
        """The costs of a plan on all workers."""
        return estimate(plan, self.allocation.workers, self.allocation.gpus)

    def placed(self, costs: Estimate) -> Estimate:
        """The costs with activations where they have room: on the workers' GPUs, or beside them."""
        return place_activations(costs, self._gpus)

    def check_room(self, costs: Estimate) -> None:
        """Refuse a run that would not fit the memory of its nodes, or of the workers' GPUs.

        Args:
            costs: as `placed` gives them.
        """
        check_memory(costs, self.allocation.nodes)
        check_device_memory(costs, self._gpus)

    def place(self, plan: Plan, workers: int) -> ActivationPlace:
        """Where the activations of this many workers have room; says so if not on their GPUs."""
        costs = self.placed(estimate(plan, workers, self.allocation.gpus))
        if costs.activations == "host":
            log_event(
                "host memory",
                f"activations, {size(costs.held_bytes)} of a worker, wait in pinned host memory: "
                "its GPU has no room for them",
            )
        return costs.activations

    def evaluation_pass(self, plan: Plan, given: EvaluationSet | None) -> int:
        """The tokens that may pass the blocks together when a result is evaluated.

        Raises:
            ExecutorError: not even a batch fits a worker's GPU.
        """
        if given is None or not self._gpus:
            return TOKENS_PER_PASS
        return evaluation_pass(EvaluationMemory.of(plan, given), self._gpus)

    def plan(self, work: Callable[[FunctionRunner], _T], *, with_workers: bool = True) -> _T:
        """Do work that needs JAX and Keras but no plan, and start the workers meanwhile.

        Args:
            with_workers: False if nothing is to be done after this.
        """
        planner, self._planner = self._planner, None
        if planner is None:
            return work(self.executor)
        with ThreadPoolExecutor(1) as pool:
            planned = pool.submit(work, planner)
            try:
                if with_workers:
                    _ = self.executor
                return planned.result()
            finally:
                planner.stop()


OpenCompute = Callable[[ComputeSpec, str, str], AbstractContextManager[Compute]]
"""`open_compute` for one cluster: of a spec, the source's URL and the run's URL."""


@contextlib.contextmanager
def open_compute(
    spec: ComputeSpec,
    source_url: str,
    run_url: str,
    *,
    address: str | None = None,
    plan_only: bool = False,
) -> Iterator[Compute]:
    """Provide workers for a run for the block, on the cluster at `address` or on this machine.

    Args:
        plan_only: one worker is enough, and none where this machine can plan.

    Raises:
        ExecutorError: there is no cluster, or more is asked than it has.
    """
    route_to_root("ray")
    with contextlib.ExitStack() as stack:
        machine = this_machine(spec)
        planner = None
        # What kind of GPU this machine has decides bytes too: then a worker plans.
        if address is not None or (spec.device != "cpu" and may_have_gpu()):
            from pipeline.executor.ray_cluster import allocate_on_cluster, connect

            at = "on this machine" if address is None else f"at {address}"
            with waiting(f"joining the Ray cluster {at}"):
                stack.enter_context(connect(address, machine))
            with waiting("finding nodes for the workers"):
                allocation = allocate_on_cluster(spec)
        else:
            allocation = allocate(spec, [machine])
            planner = stack.enter_context(local_process(worker_environment(allocation)))

        def start_workers() -> Executor:
            # Here, so that planning begins before Ray is even imported.
            from pipeline.executor.ray_cluster import connect
            from pipeline.executor.ray_executor import RayExecutor

            if planner is not None:
                with waiting("starting Ray, and workers, on this machine"):
                    stack.enter_context(connect(None, machine))
            started = dataclasses.replace(allocation, workers=1) if plan_only else allocation
            return RayExecutor(started, partial(start_worker, source_url, run_url))

        yield Compute(allocation, start_workers, planner)


def check_identity(plan: Plan, found: Identity, source_url: str, *, finished: bool) -> None:
    """Refuse to go on with a run where it would give other bytes.

    Args:
        finished: no byte is still to be made, so only the source matters.
    """
    if found.source_files_sha256 != plan.source_files_sha256:
        raise PipelineError(
            f"{source_url}: the source changed since the run was planned: its JSON, vocabulary or "
            "the sizes of its weights files are others; put it back, or start a new run elsewhere"
        )
    then, now = plan.machine | plan.versions, found.machine | found.versions
    other = differences(then, now, "{0} {2}, planned {1}")
    if other and not finished:
        raise PipelineError(
            f"the run was planned for other machines or packages ({'; '.join(other)}), which "
            "round otherwise; go on where it was planned, or start a new run elsewhere"
        )


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What this process did for a run that is now finished.

    Attributes:
        wall_seconds: that it took, evaluation aside.
        device_peak_bytes: the most that a worker used of its GPU; None without one, or if nothing
            was done.
    """

    plan: Plan
    store: ObjectStore
    manifest: Manifest
    log: EventLog
    wall_seconds: float
    device_peak_bytes: int | None

    def summarize(
        self, costs: Estimate, fidelity: Fidelity | None, work: Sequence[WorkSpan] = ()
    ) -> Summary:
        """Sum it up, in the run's event log too.

        Args:
            work: that was done after the manifest.
        """
        summary = Summary.of(
            self.plan,
            self.store,
            self.manifest,
            costs,
            self.log.seconds,
            wall_seconds=self.wall_seconds,
            device_peak_bytes=self.device_peak_bytes,
            fidelity=fidelity,
        )
        self.log.close(summary.to_dict(), work)
        return summary


def execute(
    plan: Plan,
    store: ObjectStore,
    compute: Compute,
    held: lease.Lease | None,
    metrics: RunMetrics,
    options: DriverOptions,
    *,
    damaged: Sequence[Finding] = (),
) -> Execution:
    """Make what is missing or damaged of a claimed run.

    Args:
        held: this driver's lease; None if the run is finished, and there is nothing to do.
        damaged: found in a finished run; it is moved aside and made again.
    """
    start = time.monotonic()
    log = EventLog(store, plan, compute.allocation, epoch=None if held is None else held.epoch)
    if held is None:
        manifest = read_manifest(store)
    else:
        if damaged:
            held.check()
            quarantine(store, damaged)

        def drive(plan: Plan, store: ObjectStore, log: EventLog, held: lease.Lease) -> Manifest:
            executor = compute.executor
            with watch(plan, compute.allocation, executor.doing) as report:
                return quantize(
                    plan,
                    store,
                    executor,
                    metrics.also(log.also(report), num_parts=len(plan.parts)),
                    keep_every=options.keep_every,
                    check_lease=held.check,
                    place=partial(compute.place, plan),
                )

        def capture(wanted: Plan, found: ObjectStore, held: lease.Lease) -> None:
            own = EventLog(found, wanted, compute.allocation, epoch=held.epoch)
            compute.executor.work_on(found.root_url)
            began = time.monotonic()
            try:
                drive(wanted, found, own, held)
            finally:
                compute.executor.work_on(store.root_url)
                log.captured(time.monotonic() - began)

        manifest = with_statistics(
            plan,
            store,
            options.acquire_lease,
            capture,
            partial(drive, plan, store, log, held),
        )
    seconds = time.monotonic() - start
    return Execution(
        plan=plan,
        store=store,
        manifest=manifest,
        log=log,
        wall_seconds=seconds,
        device_peak_bytes=None if held is None else compute.device_peak_bytes(),
    )
