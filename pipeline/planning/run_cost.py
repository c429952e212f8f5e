"""What a run costs: seconds by stage, hours of workers, money; and the adding up of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.planning.machines import Machine
from pipeline.planning.work import Work

Stage = Literal[
    "start",
    "compile",
    "plan",
    "read",
    "forward",
    "grams",
    "solve",
    "tune",
    "decode",
    "exchange",
    "statistics",
    "commit",
    "keep",
    "finish",
    "evaluate",
]
STAGES: tuple[Stage, ...] = get_args(Stage)
UNTIMED: frozenset[Stage] = frozenset({"start", "plan", "evaluate"})
"""Stages before a run is claimed, and after its manifest."""
_ROUNDED_PER_SECOND = 20e6
"""Weights that one thread rounds to nearest, with their error; measured, on tables that fit no
cache and in memory that is touched for the first time."""
_MOST_ROUNDING_THREADS = 8
"""As in `quantizer.row_stripes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """One stage of a run.

    Attributes:
        seconds: that the run takes longer because of it.
        hidden_seconds: that it works while others do.
        bound: what most of its time goes to, such as float32 products, or "" for none.
    """

    name: Stage
    seconds: float
    hidden_seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What earlier runs say of the model.

    Attributes:
        factor: what they took, over what the model says of them.
        corrected_by: how many they are.
        around_factor: the same of start, plan and evaluation, which a run's own log does not tell.
        around_by: how many passes that is known of; none, and both are omitted, as of older ones.
    """

    factor: float
    corrected_by: int
    around_factor: float = 1.0
    around_by: int = 0

    def with_around(self, cost: RunCost, around_seconds: Sequence[float]) -> Correction:
        """The same, and what passes took to start, plan, evaluate and publish a run.

        Args:
            cost: of the run, as the model says.
            around_seconds: that each pass took for it, before its claim and after its manifest.
        """
        predicted = cost.seconds - cost.timed_seconds
        if not around_seconds or predicted <= 0:
            return self
        factor = statistics.median(around_seconds) / predicted
        return dataclasses.replace(self, around_factor=factor, around_by=len(around_seconds))

    def factor_of(self, stage: Stage) -> float:
        return self.around_factor if stage in UNTIMED else self.factor

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        if not self.around_by:
            del values["around_factor"], values["around_by"]
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """What a run costs on so many machines of one kind.

    Attributes:
        workers: GPUs, or nodes of CPUs, of which each worker has so many `together`.
        stages: in their order; compiling is needed where no run before has done it.
        part_seconds: what each part adds to the stages between planning and the end, in the
            plan's order; not in `to_dict`.
        correction: that was made to the model's own seconds.
    """

    machine: Machine
    workers: int
    together: int = 1
    stages: tuple[StageCost, ...]
    part_seconds: tuple[float, ...] = ()
    correction: Correction | None = None

    def corrected(self, correction: Correction) -> RunCost:
        """The same by what earlier runs took."""
        stages = tuple(
            dataclasses.replace(
                stage,
                seconds=stage.seconds * correction.factor_of(stage.name),
                hidden_seconds=stage.hidden_seconds * correction.factor_of(stage.name),
            )
            for stage in self.stages
        )
        parts = tuple(correction.factor * seconds for seconds in self.part_seconds)
        return dataclasses.replace(self, stages=stages, part_seconds=parts, correction=correction)

    def on_kept_workers(self) -> RunCost:
        """The same where the run before has started the workers."""
        stages = tuple(
            dataclasses.replace(stage, seconds=0.0, hidden_seconds=0.0)
            if stage.name == "start"
            else stage
            for stage in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    def after(self, earlier: RunCost) -> RunCost:
        """Both, one after the other, on the same machines."""
        stages = tuple(
            StageCost(
                name=one.name,
                seconds=one.seconds + other.seconds,
                hidden_seconds=one.hidden_seconds + other.hidden_seconds,
                bound=max(one, other, key=lambda stage: stage.seconds).bound,
            )
            for one, other in zip(self.stages, earlier.stages, strict=True)
        )
        parts = (*earlier.part_seconds, *self.part_seconds)
        return dataclasses.replace(self, stages=stages, part_seconds=parts)

    @property
    def timed_seconds(self) -> float:
        """Of the stages that a driver times, from a run's claim to its manifest."""
        return sum(stage.seconds for stage in self.stages if stage.name not in UNTIMED)

    @property
    def seconds(self) -> float:
        """From the command to its end, with all that has to be compiled."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def worker_hours(self) -> float:
        """Of all workers; on GPUs, GPU-hours."""
        return self.workers * self.seconds / 3600

    @property
    def price(self) -> float | None:
        """In dollars; None where nobody said what a worker costs."""
        rate = self.machine.price_per_hour
        return None if rate is None else self.worker_hours * rate

    def stage(self, name: Stage) -> StageCost:
        return next(stage for stage in self.stages if stage.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "machine": self.machine.model_dump(),
            "workers": self.workers,
            "gpus_per_worker": self.together,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "worker_hours": self.worker_hours,
            "price": self.price,
            **({} if self.correction is None else self.correction.to_dict()),
        }


def resource_seconds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of some work by what takes them; their sum is how long it lasts."""
    achievable = machine.memory_bytes_per_second * machine.memory_achievable
    transfer = machine.transfer_bytes_per_second * machine.transfer_achievable
    rounding_threads = min(machine.host_threads, _MOST_ROUNDING_THREADS)
    rates = {
        "float32 products": (
            work.float32_flops,
            machine.float32_flops * machine.float32_achievable,
        ),
        "bfloat16 products": (
            work.bfloat16_flops,
            machine.bfloat16_flops * machine.bfloat16_achievable,
        ),
        "memory": (work.memory_bytes, achievable),
        "launches": (work.steps, 1 / machine.step_seconds),
        "host to device": (work.transfer_bytes, transfer),
        "host memory": (work.host_bytes, machine.host_bytes_per_second),
        "hashing": (work.hash_bytes, machine.host_hash_bytes_per_second),
        "storage": (work.storage_bytes, machine.storage_bytes_per_second),
        "rounding": (work.rounded_weights, _ROUNDED_PER_SECOND * rounding_threads),
        "between GPUs": (work.peer_bytes, machine.between_gpus),
        "network": (work.network_bytes, machine.network_bytes_per_second),
        "fixed": (work.seconds, 1.0),
    }
    return {name: amount / rate for name, (amount, rate) in rates.items() if amount}


class Ledger:
    """Seconds by stage and resource, those of the run and those beside others."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._by_resource: dict[str, Counter[str]] = {name: Counter() for name in STAGES}
        self._seconds: Counter[str] = Counter()
        self._hidden: Counter[str] = Counter()

    def add(self, stage: Stage, work: Work, *, share: float = 1.0) -> float:
        """Add work of which a share is waited for; returns its seconds."""
        found = resource_seconds(work, self._machine)
        self._by_resource[stage].update(found)
        seconds = sum(found.values())
        self._seconds[stage] += share * seconds  # type: ignore[assignment]
        self._hidden[stage] += (1 - share) * seconds  # type: ignore[assignment]
        return seconds

    @property
    def total_seconds(self) -> float:
        """Of the run, so far."""
        return sum(self._seconds.values())

    def seconds_of(self, work: Work) -> float:
        return sum(resource_seconds(work, self._machine).values())

    def stages(self) -> tuple[StageCost, ...]:
        return tuple(
            StageCost(
                name=name,
                seconds=self._seconds[name],
                hidden_seconds=self._hidden[name],
                bound=max(found, key=lambda resource: found[resource]) if found else "",
            )
            for name in STAGES
            for found in [self._by_resource[name]]
        )
