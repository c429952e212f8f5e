"""What composing a result of finished runs' blocks costs on a machine (see `cost_model`).

Each block of each run is measured in the source's place: it passes the text on through all of the
source's blocks behind it, which are read for each pass. By layers, the block alone runs once for
each unit of each run. Then the choices, and every run within the target, are compared with the
source; the result's files are copied, and read once more.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plan import PartPlan, Plan
from pipeline.planning.cost_model import EVALUATED_PER_PASS, RunModel
from pipeline.planning.evaluation_costs import Evaluated, head_flops
from pipeline.planning.machines import Machine
from pipeline.planning.run_cost import RunCost
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.planning.work import Work, forward_work, planned_on


def composition_cost(
    plans: Sequence[Plan],
    machine: Machine,
    workers: int,
    *,
    together: int = 1,
    measured: Evaluated,
    judged: Evaluated,
    num_fitting: int,
    by_layers: bool,
) -> RunCost:
    """What it costs on so many such machines: GPUs, or nodes of CPUs.

    Args:
        plans: of the runs that give blocks.
        measured: text that blocks are measured on.
        judged: text that results are compared on.
        num_fitting: how many of the runs are within the target.
        by_layers: whether layers of a block may come from several runs. Then both choices, of
            blocks and of layers, are compared, and every block is taken to be of several runs.
    """
    there = [planned_on(plan, machine.device) for plan in plans]
    model = _CompositionModel(there, machine, workers, together)
    model.open()
    model.measure_blocks(measured)
    if by_layers:
        model.measure_layers(measured)
    for _ in range(num_fitting + (2 if by_layers else 1)):
        model.evaluate(judged)
    model.copy(mixed=by_layers)
    model.finish()
    return RunCost(
        machine=machine, workers=workers, together=together, stages=model.ledger.stages()
    )


def num_units(plans: Sequence[Plan], plan: Plan, part: int) -> int:
    """How many of a block's layers, or sets of layers that stay together, a run replaces.

    Which layers read one input is known of those that any run calibrates; all experts are one unit,
    and what no run calibrates counts by layers.

    Args:
        plans: of all runs; `plan` is the run's own.
    """
    unit_of = {
        name: group.targets
        for one in plans
        for group in one.parts[part].groups
        if not group.experts
        for name in group.targets
    }
    layers = (x for x in plan.parts[part].layers if x.scheme is not None and x.kind == "kernel")
    return len({("experts",) if x.experts else unit_of.get(x.name, (x.name,)) for x in layers})


class _CompositionModel(RunModel):
    """Goes through a composition as its driver would, and adds up what it takes."""

    def __init__(
        self, plans: Sequence[Plan], machine: Machine, devices: int, together: int
    ) -> None:
        super().__init__(plans[0], machine, devices, together)
        self._plans = plans

    def measure_blocks(self, measured: Evaluated) -> None:
        """Blocks by turns on all workers, with the artifacts of all runs side by side."""
        num_runs = len(self._plans)
        blocks = self.plan.parts[1:]
        one = self._forward(measured)
        head = head_flops(self.plan, measured.num_tokens) * (1 + num_runs)
        bfloat16 = self.plan.forward_dtype == "bfloat16"
        heads = Work(bfloat16_flops=head) if bfloat16 else Work(float32_flops=head)
        in_all = Work.total(one)  # once for the source alone
        for index in range(len(blocks)):
            behind = sum(part.source_bytes for part in blocks[index:])
            in_all += Work.total(one[index:]) * num_runs + heads
            in_all += self._files(behind) * self._passes(measured)
            in_all += self._replaced(index + 1)
        self._add_shared(in_all)

    def measure_layers(self, measured: Evaluated) -> None:
        """Each block, with the source's kernels but for those of one unit of one run."""
        one = self._forward(measured)
        in_all = Work.total(one) * 2  # the source alone: to the block, and what it gives
        for index, part in enumerate(self.plan.parts[1:]):
            units = sum(num_units(self._plans, plan, index + 1) for plan in self._plans)
            in_all += one[index] * units + self._files(2 * part.source_bytes)
            in_all += self._replaced(index + 1, decoded=self._passes(measured))
        self._add_shared(in_all)

    def copy(self, *, mixed: bool) -> None:
        """One part after another, each read from its run and committed.

        Args:
            mixed: whether blocks are put together of the files of all runs, once before to know
                their size.
        """
        for number, part in enumerate(self.plan.parts):
            if mixed and number:
                self.ledger.add("read", self._read_from_runs(number) * 2)
                self.ledger.add("commit", self._commit(part))
            else:
                self.ledger.add("read", self._files(stored_bytes(self.plan, part)))
            self.ledger.add("commit", self._commit(part))

    def _forward(self, measured: Evaluated) -> list[Work]:
        """Of each block of the source."""
        tokens = measured.as_tokens(self.plan, measured.num_windows)
        return [
            forward_work(self.plan, part, tokens, self._constants) for part in self.plan.parts[1:]
        ]

    def _passes(self, measured: Evaluated) -> int:
        """How often each block that the text of all runs goes through is read."""
        return -(-measured.num_tokens * len(self._plans) // EVALUATED_PER_PASS)

    def _replaced(self, number: int, decoded: int = 1) -> Work:
        """Reading a block of every run, and decoding it so many times."""
        decode = [self._decode(plan.parts[number]) for plan in self._plans]
        return self._read_from_runs(number) + Work.total(decode) * decoded

    def _decode(self, part: PartPlan) -> Work:
        return self._work_of(part).decode

    def _read_from_runs(self, number: int) -> Work:
        return self._files(sum(stored_bytes(plan, plan.parts[number]) for plan in self._plans))

    def _files(self, num_bytes: float) -> Work:
        """Reading so much, checking it, and bringing it to the device."""
        return Work(
            storage_bytes=num_bytes,
            hash_bytes=num_bytes,
            host_bytes=2.0 * num_bytes,
            transfer_bytes=num_bytes if self._machine.device == "gpu" else 0.0,
        )

    def _add_shared(self, in_all: Work) -> None:
        """By the workers, each with blocks of its own."""
        workers = min(self._devices, max(self.plan.num_blocks, 1))
        self.ledger.add("evaluate", in_all * (1 / workers))
