"""The solver's peak memory, in units of the weight and Hessian it was given.

A fresh process per size, with the one malloc arena that workers have: the inputs are allocated,
the solver is compiled on the same shapes, the kernel's high-water mark is reset, and one solve is
watched. Its peak is the rise of resident memory plus the inputs' own bytes; the goal is at most
three times those. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.worker.memory import hand_back

SIZES = ("2048x2048", "4096x4096")
GOAL = 3.0
_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of_solve(num_inputs: int, num_outputs: int) -> dict[str, int]:
    """Bytes of the inputs, and by how much resident memory rises during a solve."""
    from quantizer import GPTQScheme, HessianSum, solve

    rng = np.random.default_rng(0)
    weight_RC = rng.standard_normal((num_outputs, num_inputs), dtype=np.float32)
    rows_NC = rng.standard_normal((num_inputs + 64, num_inputs), dtype=np.float32)
    hessian = HessianSum.of(rows_NC)
    del rows_NC
    scheme = GPTQScheme(weight_bits=4, group_size=128, scale_search=True, activation_order=True)
    solve(weight_RC, hessian, scheme)
    gc.collect()
    hand_back()  # so that it is counted when used again
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = resident_bytes("VmRSS")
    solution = solve(weight_RC, hessian, scheme)
    rise = resident_bytes("VmHWM") - before
    assert solution.report.kept
    return {"inputs": weight_RC.nbytes + hessian.gram_CC.nbytes, "rise": rise}


def measure_in_fresh_process(size: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--child", size]
    root = Path(__file__).parents[2]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    answer = subprocess.run(
        command, cwd=root, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(answer.stdout)


def memory_table(measured: dict[str, dict[str, int]]) -> Table:
    table = Table(title="peak memory of one solve (4 bits, scale search, activation order)")
    table.add_column("in × out")
    for name in ("weight + Hessian", "rise during solve", "peak", "× inputs", f"goal ≤ {GOAL:g}×"):
        table.add_column(name, justify="right")
    for size, each in measured.items():
        peak = each["inputs"] + each["rise"]
        ratio = peak / each["inputs"]
        sizes = (each["inputs"], each["rise"], peak)
        table.add_row(
            size.replace("x", "×"),
            *(f"{one / 2**20:,.0f} MiB" for one in sizes),
            f"{ratio:.2f}",
            "[green]pass[/green]" if ratio <= GOAL else "[red]falls short[/red]",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="INxOUT")
    parser.add_argument("--child", metavar="INxOUT", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    if arguments.child:
        num_inputs, num_outputs = (int(each) for each in arguments.child.split("x"))
        print(json.dumps(peak_of_solve(num_inputs, num_outputs)))
        return
    console = Console()
    measured = {}
    for size in arguments.sizes:
        with console.status(f"solving {size}"):
            measured[size] = measure_in_fresh_process(size.replace("×", "x"))
    console.print(memory_table(measured))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
