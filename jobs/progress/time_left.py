"""How long a run will still take: what the cost model says, corrected by what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.run_costs import Workers, cost_of
from pipeline.executor.protocol import Allocation
from pipeline.plan import Plan
from pipeline.planning.machines import known_machines


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the cost model says of a run.

    Attributes:
        part_seconds: of each part, in the plan's order.
        compile_seconds: that the first block takes longer.
        finish_seconds: after the last one.
        is_of_machine: whether the rates are of the machine at hand. If not, only how the seconds
            compare with each other means anything.
    """

    part_seconds: tuple[float, ...]
    compile_seconds: float = 0.0
    finish_seconds: float = 0.0
    is_of_machine: bool = False


def expected(plan: Plan, allocation: Allocation) -> Expected:
    """What to expect of a plan on the workers that it got.

    CPUs are not measured for this, and GPUs may be of an unknown kind: then some machine's rates
    are taken, which make about the same differences between the parts.
    """
    machines = known_machines()
    device = "gpu" if allocation.gpus else "cpu"
    found = machines.find(allocation.accelerator) if allocation.gpus else None
    machine = found or next(m for m in machines.by_name.values() if m.device == device)
    workers = Workers(
        number=allocation.workers * max(allocation.gpus, 1),
        machine=machine,
        together=max(allocation.gpus, 1),
    )
    cost = cost_of(plan, workers, num_windows=0)
    return Expected(
        part_seconds=cost.part_seconds,
        compile_seconds=cost.stage("compile").seconds,
        finish_seconds=cost.stage("finish").seconds,
        is_of_machine=found is not None,
    )


def seconds_left(
    expected: Expected, measured: Mapping[int, float], missing: Sequence[int], since: float
) -> float | None:
    """Seconds until a run is finished; None where nothing is known yet.

    Args:
        measured: seconds of the parts committed by this driver, each since the one before it, in
            their order.
        missing: the parts that are not committed.
        since: seconds since the last commit.
    """
    ratio = correction(expected, measured)
    if ratio is None:
        return None
    own = [expected.part_seconds[part] for part in missing]
    if own and not any(measured):
        own[-1] += expected.compile_seconds
    left = ratio * (sum(own) + expected.finish_seconds)
    # Of the part under way no more has passed than it was to take.
    return left - min(since, ratio * own[0] if own else left)


def correction(expected: Expected, measured: Mapping[int, float]) -> float | None:
    """How many times longer blocks take than the cost model says; None if that is not known.

    The first block compiles; it counts only as long as there is no other. The part of what is
    outside the blocks takes something else, and does not count.
    """
    blocks = [part for part in measured if part]
    if not blocks:
        return 1.0 if expected.is_of_machine else None
    counted = blocks[1:] or blocks
    modelled = sum(expected.part_seconds[part] for part in counted)
    if len(blocks) == 1:
        modelled += expected.compile_seconds
    return sum(measured[part] for part in counted) / modelled if modelled else None


def seconds_a_block(measured: Mapping[int, float]) -> float | None:
    """What blocks take here, on average, the first one aside; None before there is any."""
    blocks = [seconds for part, seconds in measured.items() if part]
    counted = blocks[1:] or blocks
    return sum(counted) / len(counted) if counted else None
