"""Where a run's work is done, as its driver sees it: numbered workers, handles to results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast

from pydantic import ConfigDict

from pipeline.errors import PipelineError
from pipeline.executor.work_spans import Doing, WorkSpan
from pipeline.storage.record import STRICT

P = ParamSpec("P")
T = TypeVar("T")

Device = Literal["auto", "cpu", "gpu"]
ActivationPlace = Literal["device", "host"]
"""Where activations wait between two stages of a block: on their worker's device, or beside it."""


class WorkerLostError(Exception):
    """A worker, or something that it held, is gone; its work can be done again."""


class ExecutorError(PipelineError):
    """Work cannot be carried out here; the message says what is missing."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class ComputeSpec:
    """What a user asks of a cluster; None leaves it to the cluster.

    Attributes:
        workers, threads: how many workers, and threads of each one's matrix products.
        memory_bytes: the most that a worker may use.
        accelerator: the kind of GPU, as Ray names it, such as H100; None for the only kind there
            is.
        gpus_per_worker: all of one node; None for as many as possible.
        one_gpu_each: where `gpus_per_worker` does not say otherwise (see `with_one_gpu_each`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    workers: int | None = None
    threads: int | None = None
    device: Device = "auto"
    memory_bytes: int | None = None
    accelerator: str | None = None
    gpus_per_worker: int | None = None
    one_gpu_each: bool = False

    def __post_init__(self) -> None:
        if self.gpus_per_worker is not None and self.device == "cpu":
            raise ExecutorError(
                f"{self.gpus_per_worker} GPUs per worker, and the device is to be cpu; leave out "
                "one of the two"
            )
        if self.accelerator is not None and self.device == "cpu":
            raise ExecutorError(
                f"accelerator {self.accelerator} is a kind of GPU, and the device is to be cpu; "
                "leave out one of the two"
            )

    def with_one_gpu_each(self) -> ComputeSpec:
        """The same, with a GPU for each worker, unless the user says how many.

        For runs without calibration, of which a worker does one part after the other, and most of
        that on its host.
        """
        if self.gpus_per_worker is not None or self.device == "cpu":
            return self
        return dataclasses.replace(self, one_gpu_each=True)

    def without_kind(self) -> ComputeSpec:
        """The same without what it asks of GPUs, to plan here for machines that are elsewhere."""
        device: Device = "auto" if self.device == "gpu" else self.device
        return dataclasses.replace(self, device=device, accelerator=None, gpus_per_worker=None)


@dataclass(frozen=True, kw_only=True)
class NodeRoom:
    """How many of a run's workers a node can hold at most, and bytes of memory for them."""

    workers: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a run gets.

    Attributes:
        threads: of each worker's matrix products, whose rounding their number decides on CPUs.
        gpus: of each worker, all of one node; 0 on CPUs.
        accelerator: the kind of these GPUs, as Ray names it; "" if it is not known.
        nodes: those with room for workers.
    """

    workers: int
    threads: int
    gpus: int = 0
    accelerator: str = ""
    nodes: tuple[NodeRoom, ...] = ()

    def to_dict(self) -> dict[str, int | str]:
        """Plain JSON values, without the nodes."""
        found: dict[str, int | str] = {
            "workers": self.workers,
            "threads": self.threads,
            "gpus": self.gpus,
        }
        return found | ({"accelerator": self.accelerator} if self.accelerator else {})


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What a worker may use of its device, or of each of them.

    Attributes:
        node, kind: where it is, and what it is.
        num_bytes: None where the device does not say, as a CPU, whose memory is the node's.
        peak_bytes: the most of it that was in use so far; None likewise.
    """

    node: str
    kind: str
    num_bytes: int | None
    peak_bytes: int | None = None


class Handle(Generic[T]):
    """Stands for the result of a call that a worker may not have begun."""


def argument(handle: Handle[T]) -> T:
    """A handle, typed as its result, to be passed to another call: the executor replaces it."""
    return cast(T, handle)


ConcurrencyGroup = Literal["read", "commit"]
"""Calls that wait for storage, and so run beside those that compute."""


def concurrent(group: ConcurrencyGroup) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Mark a protocol's method that may run beside a worker's other calls.

    Args:
        group: its calls wait for each other, in the order in which a worker was given them, and
            for no other call.
    """

    def mark(method: Callable[P, T]) -> Callable[P, T]:
        method.__dict__["concurrency_group"] = group
        return method

    return mark


def group_of(method: Callable[..., object]) -> ConcurrencyGroup | None:
    """The group of a `concurrent` method; None for others, which run one after another."""
    return method.__dict__.get("concurrency_group")


class FunctionRunner(Protocol):
    """Processes that have JAX and Keras; the driver imports neither."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a module's function in one of them.

        Raises:
            ExecutorError: the process is lost again and again.
            Exception: what the function raised.
        """

    def run_each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call a module's function with each of several arguments, spread over the processes.

        Raises: as `run`.
        """


class Executor(FunctionRunner, Protocol):
    """Workers 0 … num_workers - 1, whose methods are those of `pipeline.run.worker_api.WorkerApi`.

    How many there are may change in `recover`, and then only.
    """

    num_workers: int

    def work_on(self, run_url: str) -> None:
        """Have all calls from now on answered by workers of another run.

        They are the same processes: what a worker held for the run before is gone.
        """

    def submit(
        self,
        worker: int,
        method: Callable[Concatenate[Any, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Handle[T]:
        """Call a worker's method, named by its protocol's.

        A worker runs one call at a time, and beside it one of each group of `concurrent` methods.
        Handles among the arguments (see `argument`) are replaced by their results.
        """

    def fetch(self, handles: Sequence[Handle[T]]) -> list[T]:
        """Wait for results.

        Raises:
            WorkerLostError: a worker died on the way.
            Exception: what the worker raised.
        """

    def take_work(self) -> list[WorkSpan]:
        """What the workers did since the last call; what a lost one had done is lost with it."""

    def doing(self) -> Mapping[int, Doing]:
        """What workers do now, by number: of those that answer at once. From any thread."""

    def recover(self) -> Sequence[str]:
        """Wait until workers answer again; returns what changed about them, in words."""
