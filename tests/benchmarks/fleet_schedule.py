"""How long fleets take, on paper: 1,000 models on 64 GPUs, and a mixture of 671 billion on eight.

    KERAS_BACKEND=jax python -m tests.benchmarks.fleet_schedule

The 1,000 are models of four published shapes in gptq-w4-g128, each with as many GPUs as its shape
needs, every tenth of them urgent. They are planned, costed and scheduled as `quantfleet submit
CATALOG --dry-run --on 64xH100 --at-once 64` does with a catalog of them, from folders whose weights
are holes in sparse files. KerasHub has no DeepSeek-V3, whose plan is made by hand
(`tests.benchmarks.expert_costs`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.fleet.schedule import simulated
from jobs.fleet.simulation import Failures, Schedule, SimulatedRun, simulate
from jobs.quantities import duration
from jobs.run_costs import Workers, cost_of
from pipeline.executor.protocol import ComputeSpec, ExecutorError
from pipeline.planning.machines import known_machines
from pipeline.planning.run_cost import RunCost
from pipeline.recipe.recipe_file import load_recipe
from pipeline.remote_planning import plan_for_costs
from tests.benchmarks.expert_costs import DEEPSEEK, planned
from tests.models.large_shapes import large_folder

_MACHINE, _GPUS = "H100", 64
_URGENT = 10
_FAILING_HOURS = (None, 20.0, 2.0)


@dataclass(frozen=True)
class Kind:
    """Models of one shape, and the GPUs that each gets, all of one node."""

    shape: str
    number: int
    gpus: int


FLEET = (
    Kind("llama-3-8b", 800, 1),
    Kind("qwen3-30b-a3b", 120, 2),
    Kind("mixtral-8x7b", 50, 4),
    Kind("llama-3-70b", 30, 8),
)


def cost_of_kind(kind: Kind) -> RunCost:
    """What one model costs on its GPUs."""
    recipe = load_recipe("gptq-w4-g128").model_copy(update={"allow_partial": True})
    with tempfile.TemporaryDirectory() as folder:
        path = large_folder(Path(folder) / kind.shape, kind.shape)
        plan = plan_for_costs(str(path), recipe, 1)
    needs = ComputeSpec(workers=1, gpus_per_worker=kind.gpus)
    workers = Workers.on(_GPUS, known_machines().named(_MACHINE)).for_needs(needs)
    workers.check_room(workers.estimate(plan))
    return cost_of(workers.plan(plan), workers, num_windows=0)


def runs_of(kind: Kind, cost: RunCost) -> list[SimulatedRun]:
    """All models of a kind, of which every tenth is urgent."""
    return [
        simulated(f"{kind.shape}-{i:04d}", cost, 0 if i % _URGENT else 1)
        for i in range(kind.number)
    ]


def print_fleet(fleet: Sequence[Kind]) -> None:
    """Tables of the fleet's shapes, and of its schedules."""
    costs = {kind: cost_of_kind(kind) for kind in fleet}
    print(
        f"\n| shape | models | {_MACHINE}s each | time of one | GPU-hours of all | price of all |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    hours = {kind: kind.number * cost.worker_hours for kind, cost in costs.items()}
    prices = {kind: kind.number * (cost.price or 0.0) for kind, cost in costs.items()}
    for kind, cost in costs.items():
        cells = f"{kind.number} | {kind.gpus} | {duration(cost.seconds)}"
        print(f"| {kind.shape} | {cells} | {hours[kind]:.1f} | ${prices[kind]:.0f} |")
    number = sum(kind.number for kind in fleet)
    print(f"| in all | {number} | | | {sum(hours.values()):.1f} | ${sum(prices.values()):.0f} |")
    print("\n| a GPU fails every | failures | urgent ones done | all done | in use | mean wait |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    runs = [run for kind, cost in costs.items() for run in runs_of(kind, cost)]
    for failing in _FAILING_HOURS:
        failures = None if failing is None else Failures(3600 * failing)
        print(_row(failing, simulate(runs, _GPUS, failures=failures)))


def _row(failing: float | None, schedule: Schedule) -> str:
    cells = (
        "never" if failing is None else f"{failing:g} hours",
        str(schedule.failures),
        duration(max(one.end for one in schedule.entries if one.run.priority)),
        duration(schedule.makespan),
        f"{schedule.utilisation:.0%}",
        duration(schedule.mean_wait),
    )
    return f"| {' | '.join(cells)} |"


def print_mixture() -> None:
    """A table of DeepSeek-V3's shape on eight GPUs."""
    plan = planned(DEEPSEEK)
    print(f"\n| {DEEPSEEK.name} on | time | GPU-hours | price | memory of a GPU |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name in ("H100", "H200"):
        workers = Workers.on(8, known_machines().named(name))
        cost = cost_of(workers.plan(plan), workers, num_windows=0)
        schedule = simulate([simulated(DEEPSEEK.name, cost)], workers.number)
        needs = workers.estimate(plan)
        try:
            workers.check_room(needs)
            room = "fits"
        except ExecutorError:
            room = "**too much**"
        has = f"{needs.device_bytes / 1e9:.0f} of {workers.machine.memory_bytes / 1e9:.0f} GB"
        cells = f"{duration(schedule.makespan)} | {cost.worker_hours:.1f} | ${cost.price or 0:.0f}"
        print(f"| 8 × {name} | {cells} | {has}: {room} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[kind.shape for kind in FLEET], help="one shape")
    only = parser.parse_args().only
    print_mixture()
    print_fleet([kind for kind in FLEET if only in (None, kind.shape)])


if __name__ == "__main__":
    main()
