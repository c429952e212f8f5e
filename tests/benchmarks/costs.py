"""What the cost model says: of large models on GPUs, and beside a measured run on this machine.

    python -m tests.benchmarks.costs                      the tables of docs/costs.md
    python -m tests.benchmarks.costs --check PRESET --recipe FILE [--runs 3]

The tables plan folders of the published shapes whose weights are holes in sparse files, as
`quantfleet quantize FOLDER --dry-run --on 8xH100` does. A check runs the whole command so many
times, each right after a dry run, and compares the seconds of both; compare ratios, since a machine
that is shared changes its speed between the two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.quantities import size
from jobs.run_costs import Workers, cost_of
from pipeline.executor.protocol import ExecutorError
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning.machines import known_machines, workers_on
from pipeline.planning.make_plan import make_plan
from pipeline.planning.run_cost import STAGES
from pipeline.recipe.recipe_file import load_recipe, recipe_from_dict
from tests.models.large_shapes import SHAPES, large_folder

_MACHINES = ("H100", "8xH100", "8xL4")
_RECIPE = "gptq-w4-g128"
# Longer than any calibration: its tokens are counted, and never read.
_TEXT = "The quick brown fox jumps over the lazy dog. " * 40_000


def large_plan(name: str, folder: Path, **calibration: int) -> Plan:
    """The plan of one of SHAPES, made without reading a weight.

    Args:
        calibration: other than the recipe's, such as num_samples.
    """
    texts = folder / "texts.txt"
    texts.write_text(_TEXT)
    values = load_recipe(_RECIPE).to_dict()
    values["calibration"] |= {"texts": [str(texts)], **calibration}
    recipe = recipe_from_dict(values | {"allow_partial": True}, where=_RECIPE)
    preset = read_preset(str(large_folder(folder / name, name)))
    return make_plan(preset, recipe, threads=1, read_weights=False).plan


def print_tables(names: Sequence[str]) -> None:
    """A table for each of SHAPES: seconds by stage on each machine, hours and price."""
    machines = known_machines()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            plan = large_plan(name, Path(folder))
        costs, needs = [], []
        for given in _MACHINES:
            number, kind = workers_on(given)
            workers = Workers.on(number, machines.named(kind))
            costs.append(cost_of(plan, workers, num_windows=0))
            needs.append(_memory(workers, plan))
        print(f"\n{name}\n")
        print("| seconds | " + " | ".join(f"{c.workers} × {c.machine.name}" for c in costs) + " |")
        print("| --- |" + " ---: |" * len(costs))
        for stage in STAGES:
            found = [cost.stage(stage) for cost in costs]
            if any(one.seconds >= 0.05 for one in found):
                cells = (f"{x.seconds:.1f} ({x.bound})" for x in found)
                print(f"| {stage} | " + " | ".join(cells) + " |")
        print("| in all | " + " | ".join(f"{cost.seconds:.0f}" for cost in costs) + " |")
        print("| GPU memory | " + " | ".join(needs) + " |")
        print("| GPU-hours | " + " | ".join(f"{cost.worker_hours:.3g}" for cost in costs) + " |")
        prices = (f"${cost.price:.2f}" for cost in costs if cost.price is not None)
        print("| price | " + " | ".join(prices) + " |")


def _memory(workers: Workers, plan: Plan) -> str:
    """What a worker needs of its GPU, and whether it has that."""
    costs = workers.estimate(plan)
    needed = size(costs.device_bytes)
    where = ", activations beside" if costs.activations == "host" else ""
    try:
        workers.check_room(costs)
    except ExecutorError:
        return f"{needed}: **too much**"
    return needed + where


_MEASURED = {
    "forward and grams": (("forward", "grams"), ("capture", "propagate")),
    "solve and decode": (("solve", "decode"), ("solve", "solve_slices", "join")),
    "read": (("read",), ("read",)),
    "commit": (("commit",), ("commit",)),
}
"""Stages of the model, and the worker's methods whose seconds are theirs."""


def check(preset: str, recipe: str, runs: int) -> None:
    """Predicted and measured seconds of a run, without evaluation, start and what is compiled."""
    ratios = []
    for number in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = ["quantize", preset, "--recipe", recipe, "--output", f"{folder}/run"]
            predicted = _call(*command, "--dry-run")["cost"]
            measured = _call(*command)
        stages = {stage["name"]: stage for stage in predicted["stages"]}
        # A run's own clock begins once it is planned.
        wall = sum(
            stage["seconds"]
            for name, stage in stages.items()
            if name not in ("start", "compile", "plan", "evaluate")
        )
        ratios.append(wall / measured["wall_seconds"])
        gflops = predicted["machine"]["float32_flops"] / 1e9
        print(
            f"run {number + 1}: predicted {wall:.1f} s at {gflops:.0f} Gflop/s, measured ", end=""
        )
        print(f"{measured['wall_seconds']:.1f} s, ratio {ratios[-1]:.2f}")
        for label, (ours, theirs) in _MEASURED.items():
            foreseen = sum(stages[x]["seconds"] + stages[x]["hidden_seconds"] for x in ours)
            taken = sum(measured["seconds"].get(x, 0.0) for x in theirs)
            print(f"    {label:18} predicted {foreseen:6.1f}, measured {taken:6.1f}")
    print(f"ratios {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}")


def _call(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.cli.start", *arguments, "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="PRESET")
    parser.add_argument("--only", choices=SHAPES, help="the table of one shape")
    parser.add_argument("--recipe", default="tests/demo/recipe.yaml")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    if given.check is None:
        print_tables([given.only] if given.only else list(SHAPES))
    else:
        check(given.check, given.recipe, given.runs)


if __name__ == "__main__":
    main()
