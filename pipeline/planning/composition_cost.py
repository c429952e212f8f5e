"""What composing a result of finished runs' blocks costs on a machine (see `cost_model`).

Each block of each run is measured in the source's place: it passes the text on through all of the
source's blocks behind it, which are read for each pass. Then the choice, and every run within the
target, are compared with the source; the result's files are copied, and read once more.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plan import Plan
from pipeline.planning.cost_model import EVALUATED_PER_PASS, RunModel
from pipeline.planning.evaluation_costs import Evaluated, head_flops
from pipeline.planning.machines import Machine
from pipeline.planning.run_cost import RunCost
from pipeline.planning.work import Work, forward_work, planned_on


def composition_cost(
    plans: Sequence[Plan],
    machine: Machine,
    workers: int,
    *,
    together: int = 1,
    measured: Evaluated,
    judged: Evaluated,
    num_judged: int,
) -> RunCost:
    """What it costs on so many such machines: GPUs, or nodes of CPUs.

    Args:
        plans: of the runs that give blocks.
        measured: text that blocks are measured on.
        judged: text that results are compared on.
        num_judged: how many results are: the choice, and the runs within the target.
    """
    model = _CompositionModel(planned_on(plans[0], machine.device), machine, workers, together)
    model.open()
    model.measure(measured, len(plans))
    for _ in range(num_judged):
        model.evaluate(judged)
    model.copy()
    model.finish()
    return RunCost(
        machine=machine, workers=workers, together=together, stages=model.ledger.stages()
    )


class _CompositionModel(RunModel):
    """Goes through a composition as its driver would, and adds up what it takes."""

    def measure(self, measured: Evaluated, num_runs: int) -> None:
        """Blocks by turns on all workers, with the artifacts of all runs side by side."""
        windows = measured.num_windows
        tokens = measured.as_tokens(self.plan, windows)
        passes = -(-measured.num_tokens * num_runs // EVALUATED_PER_PASS)
        blocks = self.plan.parts[1:]
        one = [forward_work(self.plan, part, tokens, self._constants) for part in blocks]
        decoded = [self._work_of(part).decode for part in blocks]
        head = head_flops(self.plan, measured.num_tokens) * (1 + num_runs)
        bfloat16 = self.plan.forward_dtype == "bfloat16"
        heads = Work(bfloat16_flops=head) if bfloat16 else Work(float32_flops=head)
        in_all = Work.total(one)  # once for the source alone
        for index, part in enumerate(blocks):
            read = sum(behind.source_bytes for behind in blocks[index:]) * passes
            files = Work(
                storage_bytes=read,
                hash_bytes=read,
                host_bytes=2.0 * read,
                transfer_bytes=read if self._machine.device == "gpu" else 0.0,
            )
            in_all += Work.total(one[index:]) * num_runs + decoded[index] * num_runs + heads
            in_all += files + self._read(part) * num_runs
        self.ledger.add("evaluate", in_all * (1 / min(self._devices, max(len(blocks), 1))))

    def copy(self) -> None:
        """One part after another, each read from its run and committed."""
        for part in self.plan.parts:
            self.ledger.add("read", self._read(part))
            self.ledger.add("commit", self._commit(part))
