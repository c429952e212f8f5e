"""What a run would cost on the cluster at hand, or on machines that the user names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from jobs.logging import MOST_ROWS
from jobs.quantities import duration, size
from jobs.room import check_device_memory, check_memory, place_activations
from pipeline.errors import PipelineError
from pipeline.executor.protocol import (
    Allocation,
    ComputeSpec,
    DeviceMemory,
    FunctionRunner,
    NodeRoom,
)
from pipeline.executor.worker_environment import GPU_MEMORY_SHARE
from pipeline.plan import Plan
from pipeline.planning.cost_model import run_cost
from pipeline.planning.estimates import Estimate, estimate
from pipeline.planning.evaluation_costs import Evaluated
from pipeline.planning.machines import (
    Machine,
    Machines,
    RatesError,
    known_machines,
    workers_on,
)
from pipeline.planning.micro_batch import in_fitting_micro_batches
from pipeline.planning.run_cost import Correction, RunCost, Stage
from pipeline.planning.work import planned_on
from pipeline.remote_planning import measured_machine

_EVALUATED_TOKENS = 512
"""Of a window that a result without calibration is judged on."""
_STAGES: dict[Stage, str] = {
    "start": "start of workers",
    "compile": "compiling, the first time",
    "plan": "plan, hash the source",
    "read": "read blocks",
    "forward": "forward",
    "grams": "Grams",
    "solve": "factor, solve",
    "tune": "tune",
    "decode": "decode",
    "exchange": "calls, exchange",
    "statistics": "store, read statistics",
    "commit": "commit blocks",
    "keep": "keep activations",
    "finish": "verify, seal",
    "evaluate": "evaluate",
}


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Workers that may not exist, on so many machines of a kind: GPUs, or nodes of CPUs.

    Attributes:
        together: GPUs of each worker.
        is_fixed: whether the user says how many that are.
    """

    number: int
    machine: Machine
    together: int = 1
    is_fixed: bool = False

    @classmethod
    def on(cls, number: int, machine: Machine) -> Workers:
        """What a cluster of them would give: a worker for each node, with all of its GPUs."""
        of_a_node = min(number, machine.workers_per_node) if machine.device == "gpu" else 1
        return cls(number=number, machine=machine, together=1 if number % of_a_node else of_a_node)

    def with_gpus_each(self, gpus: int | None) -> Workers:
        """The same with so many GPUs for each worker; None leaves it as it is.

        Raises:
            RatesError: there are not so many, or some would be left over.
        """
        if gpus is None:
            return self
        what = f"{gpus} GPUs per worker, on {self.number} × {self.machine.name}"
        most = min(self.number, self.machine.workers_per_node)
        if self.machine.device == "cpu":
            raise RatesError(f"{what}: that machine has no GPU; name one that has")
        if gpus > most:
            raise RatesError(f"{what}: a node has {most}; ask for no more than that")
        if self.number % gpus:
            raise RatesError(f"{what}: {self.number % gpus} would be left over; ask for a divisor")
        return dataclasses.replace(self, together=gpus, is_fixed=True)

    def for_needs(self, needs: ComputeSpec) -> Workers:
        """Those of them that a run would take, which says what it needs.

        Raises:
            RatesError: it asks for more than there are.
        """
        found = self.with_gpus_each(needs.gpus_per_worker)
        if needs.workers is None:
            return found
        # As a cluster divides a node's GPUs (`pipeline.executor.allocation`).
        most = 1 if found.is_fixed else found.together
        fitting = (
            parts
            for parts in range(1, most + 1)
            if most % parts == 0 and needs.workers * (found.together // parts) <= found.number
        )
        parts = next(fitting, None)
        if parts is None:
            raise RatesError(
                f"the run asks for {needs.workers} workers, and --on names {found.number} × "
                f"{found.machine.name}; name more"
            )
        together = found.together // parts
        return dataclasses.replace(found, number=needs.workers * together, together=together)

    @property
    def allocation(self) -> Allocation:
        """What such a cluster would give a run."""
        on_gpus = self.machine.device == "gpu"
        return Allocation(
            workers=self.number // self.together,
            threads=self.machine.host_threads * self.together,
            gpus=self.together if on_gpus else 0,
            accelerator=self.machine.name if on_gpus else "",
        )

    def together_for(self, plan: Plan) -> int:
        """GPUs of each worker; one without calibration (see `ComputeSpec.with_one_gpu_each`)."""
        return self.together if plan.chained or self.is_fixed else 1

    def plan(self, plan: Plan) -> Plan:
        """The plan as it would be made there (see `planned_on`)."""
        there = planned_on(plan, self.machine.device)
        rooms = [device.num_bytes for device in self._devices]
        return in_fitting_micro_batches(there, rooms[0] if rooms else None)

    def estimate(self, plan: Plan) -> Estimate:
        """The memory that each would need."""
        together = self.together_for(plan)
        costs = estimate(self.plan(plan), self.number // together, together)
        return place_activations(costs, self._devices)

    def check_room(self, costs: Estimate) -> None:
        """Refuse a run that would not fit their memory.

        Raises:
            ExecutorError: as of a cluster.
        """
        check_device_memory(costs, self._devices)
        if self.machine.device == "cpu":
            room = int(self.machine.memory_bytes)
            check_memory(costs, [NodeRoom(workers=1, memory_bytes=room)])

    @property
    def _devices(self) -> list[DeviceMemory]:
        if self.machine.device == "cpu":
            return []
        room = int(GPU_MEMORY_SHARE * self.machine.memory_bytes)
        kind = self.machine.name
        return [DeviceMemory(node=f"{self.number} × {kind}", kind=kind, num_bytes=room)]


@dataclass(frozen=True, kw_only=True)
class PricedMachine:
    """Where a run is to be costed.

    Attributes:
        machines: all that are known.
        named: the workers that the user names; None for those at hand.
    """

    machines: Machines
    named: Workers | None

    @classmethod
    def of(cls, on: str | None, rates: str | None, gpus: int | None = None) -> PricedMachine:
        """Of the options --on and --rates, before anything is planned.

        Args:
            gpus: of each worker, if the user says how many.

        Raises:
            RatesError: an unknown machine, or a file of rates that cannot be used.
        """
        machines = known_machines(rates)
        if on is None:
            return cls(machines=machines, named=None)
        workers, name = workers_on(on)
        named = Workers.on(workers, machines.named(name)).with_gpus_each(gpus)
        return cls(machines=machines, named=named)

    def find(self, runner: FunctionRunner, allocation: Allocation) -> Workers | str:
        """The workers, with the rates of their machines; or, in words, why these are not known."""
        if self.named is not None:
            return self.named
        if not allocation.gpus:
            measured = runner.run(measured_machine, allocation.threads)
            return Workers(number=allocation.workers, machine=self.machines.at_hand(measured))
        kind = allocation.accelerator or "of an unknown kind"
        found = self.machines.find(kind)
        if found is None:
            return (
                f"no rates are known for GPUs {kind}; describe them in a file that you give as "
                f"--rates, or name others with --on: {', '.join(self.machines.by_name)}"
            )
        return Workers(
            number=allocation.workers * allocation.gpus,
            machine=self.machines.at_hand(found),
            together=allocation.gpus,
        )


def refuse_without_dry_run(on: str | None, rates: str | None, *, dry_run: bool) -> None:
    """Refuse options that only a dry run heeds."""
    for name, value in (("--on", on), ("--rates", rates)):
        if value is not None and not dry_run:
            raise PipelineError(
                f"{name} {value}: what a run would cost is for a dry run to say; add --dry-run"
            )


def windows_of_text(plan: Plan, num_windows: int) -> Evaluated:
    """Text that a plan's result is judged on: windows as long as calibration's."""
    length = _EVALUATED_TOKENS if plan.tokens is None else plan.tokens.sequence_length
    return Evaluated(num_windows=num_windows, sequence_length=length)


def cost_of(
    plan: Plan,
    workers: Workers,
    *,
    num_windows: int,
    keep_every: int = 8,
    captured: bool = False,
) -> RunCost:
    """What a plan costs.

    Args:
        plan: as it is made for these workers.
        num_windows: that source and result are compared on; 0 for none.
        captured: whether another run has made the statistics that it uses, if it uses any.
    """
    evaluated = windows_of_text(plan, num_windows) if num_windows else None
    return run_cost(
        plan,
        workers.machine,
        workers.number,
        together=workers.together_for(plan),
        evaluated=evaluated,
        keep_every=keep_every,
        captured=captured,
    )


def cost_json(cost: RunCost | str) -> Mapping[str, Any]:
    """Plain JSON values, below the keys `cost` and, where it is not known, `cost_unknown`."""
    if isinstance(cost, str):
        return {"cost": None, "cost_unknown": cost}
    return {"cost": cost.to_dict()}


def cost_table(cost: RunCost) -> Table:
    """Seconds by stage, and what they sum up to."""
    machine, kind = cost.machine, _kind(cost)
    table = Table(
        "stage",
        *(Column(name, justify="right") for name in ("seconds", "beside others")),
        "most of it",
        title=f"cost on {cost.workers} × {machine.name}: a model, not a measurement",
        caption=f"rates: {machine.source}",
    )
    for stage in cost.stages:
        if stage.seconds + stage.hidden_seconds >= 0.05:
            hidden = f"{stage.hidden_seconds:.1f}" if stage.hidden_seconds >= 0.05 else ""
            table.add_row(_STAGES[stage.name], f"{stage.seconds:.1f}", hidden, stage.bound)
    table.add_section()
    table.add_row("in all", f"{cost.seconds:.1f}", "", duration(cost.seconds))
    table.add_row(f"{kind}-hours", f"{cost.worker_hours:.3g}", "", "")
    table.add_row("price", *_price(cost))
    return table


@dataclass(frozen=True, kw_only=True)
class CatalogCost:
    """What one run of several costs, with the bytes of weights that it reads and writes."""

    name: str
    cost: RunCost
    read_bytes: int
    stored_bytes: int


def costs_table(costs: Iterable[CatalogCost]) -> Table:
    """What several runs, one at least, cost one after another; of very many the first are shown."""
    table = Table(
        "run",
        *(Column(name, justify="right") for name in ("seconds", "", "price", "reads", "stores")),
        "corrected by",
    )
    machines: dict[str, None] = {}
    number, seconds, hours, read_bytes, written_bytes = 0, 0.0, 0.0, 0, 0
    price: float | None = None
    for one in costs:
        cost, past = one.cost, one.cost.correction
        machines[f"{cost.workers} × {cost.machine.name}"] = None
        seconds += cost.seconds
        hours += cost.worker_hours
        read_bytes += one.read_bytes
        written_bytes += one.stored_bytes
        if cost.price is not None:
            price = (price or 0.0) + cost.price
        if number == 0:
            table.columns[2].header = f"{_kind(cost)}-hours"
            table.caption = cost.machine.price_source or None
        if number < MOST_ROWS:
            table.add_row(
                Text(one.name),
                f"{cost.seconds:.0f}",
                f"{cost.worker_hours:.3g}",
                _dollars(cost),
                size(one.read_bytes),
                size(one.stored_bytes),
                "–" if past is None else _corrected_by(past),
            )
        number += 1
    if number > MOST_ROWS:
        table.add_row(f"and {number - MOST_ROWS} more; --json has all")
    table.title = f"cost on {', '.join(machines)}: a model, not a measurement"
    table.add_section()
    table.add_row(
        "in all",
        f"{seconds:.0f}",
        f"{hours:.3g}",
        "–" if price is None else f"${price:.2f}",
        size(read_bytes),
        size(written_bytes),
        "",
    )
    return table


def _corrected_by(past: Correction) -> str:
    text = f"{past.corrected_by} run(s), × {past.factor:.2f}"
    return text + (f"; start, plan and end × {past.around_factor:.2f}" if past.around_by else "")


def _kind(cost: RunCost) -> str:
    """What hours are of."""
    return "GPU" if cost.machine.device == "gpu" else "worker"


def _dollars(cost: RunCost) -> str:
    return "–" if cost.price is None else f"${cost.price:.2f}"


def _price(cost: RunCost) -> tuple[str, str, Text]:
    rate = cost.machine.price_per_hour
    if cost.price is None or rate is None:
        return "–", "", Text("set price_per_hour in a file of --rates")
    where = f", {cost.machine.price_source}" if cost.machine.price_source else ""
    return _dollars(cost), "", Text(f"at ${rate:.2f} a {_kind(cost)}-hour{where}")
