"""Peak memory of one worker that quantizes mixtures of experts, beside what the plan says.

    python -m tests.benchmarks.expert_memory            blocks of Qwen3-30B-A3B's shape, and sizes
    python -m tests.benchmarks.expert_memory --small    only the small ones

A block has random bfloat16 weights, in a checkpoint with a matrix for each expert. What is printed
is the largest resident memory of a process that plans nothing and does all that a worker does, and
of a call of each of its methods.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from jobs.quantities import size
from pipeline.executor.protocol import Allocation
from pipeline.executor.worker_environment import worker_environment
from pipeline.model.preset import read_preset
from pipeline.planning.estimates import Estimate, estimate
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from quantizer.schemes import GPTQScheme
from tests.models.large_shapes import large_folder

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "head_dim": 32,
    "vocab_size": 512,
    "num_experts": 64,
}
"""Sizes that take seconds."""

_PROGRAM = """
import json, re, sys, time
from collections import defaultdict
from pathlib import Path
from pipeline.plan import Plan
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from tests.pipeline.local_executor import LocalExecutor

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

peaks, seconds = defaultdict(int), defaultdict(float)

class Watched(LocalExecutor):
    def submit(self, worker, method, *args, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is the present size
        start, name = time.monotonic(), method.__name__
        try:
            return super().submit(worker, method, *args, **kwargs)
        finally:
            peaks[name] = max(peaks[name], peak())
            seconds[name] += time.monotonic() - start

plan, windows, source, output = sys.argv[1:]
store = open_store(output)
plan = claim(store, Plan.from_json(Path(plan).read_bytes()), Path(windows).read_bytes())
executor = Watched([Worker(plan, source, output)])
quantize(plan, store, executor, lambda step: None, keep_every=2)
print(json.dumps({"peaks": peaks, "seconds": seconds}))
"""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A finished run.

    Attributes:
        peaks: in bytes, by the worker's method.
    """

    costs: Estimate
    peaks: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())


def weighed(folder: Path, *, num_samples: int = 64, **changes: int) -> Weighed:
    """Quantize a model of Qwen3-30B-A3B's shape in a process of its own.

    Args:
        num_samples: windows of 64 tokens.
        changes: keys of config.json to set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(topics.values()), encoding="utf-8")
    calibration = Calibration(
        texts=(str(folder / "text.txt"),), num_samples=num_samples, sequence_length=64
    )
    recipe = Recipe(
        name="memory",
        scheme=GPTQScheme(weight_bits=4, group_size=128),
        calibration=calibration,
    )
    source = large_folder(folder / "source", "qwen3-30b-a3b", filled=True, **changes)
    given = make_plan(read_preset(str(source)), recipe, threads=2)
    assert given.windows is not None
    (folder / "plan.json").write_bytes(given.plan.to_json())
    (folder / "windows").write_bytes(given.windows.to_bytes())
    names = ("plan.json", "windows", "source", "run")
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *(str(folder / name) for name in names)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | worker_environment(Allocation(workers=1, threads=2)),
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr[-2000:])
    found = json.loads(finished.stdout)
    return Weighed(costs=estimate(given.plan, 1), **found)


def _print(label: str, found: Weighed) -> None:
    costs = found.costs
    print(
        f"{label}: peak {size(found.peak_bytes)}, planned {size(costs.worker_bytes)}; "
        f"{costs.weights / 1e6:.0f} million weights, {sum(found.seconds.values()):.0f} s"
    )
    for name, peak in sorted(found.peaks.items(), key=lambda one: -one[1]):
        print(f"    {name:12} {size(peak):>10} {found.seconds.get(name, 0.0):8.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.expert_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    cases: list[tuple[str, dict[str, int]]] = []
    if not small:
        cases += [
            (f"{blocks} block(s) of Qwen3-30B-A3B's shape", {"num_hidden_layers": blocks})
            for blocks in (1, 2)
        ]
    cases += [
        (
            f"{experts} experts of 512 × 256",
            {**SMALL, "num_hidden_layers": 1, "num_experts": experts},
        )
        for experts in (64, 128, 256)
    ]
    for label, changes in cases:
        with tempfile.TemporaryDirectory() as folder:
            _print(label, weighed(Path(folder), **{"vocab_size": 512, **changes}))


if __name__ == "__main__":
    main()
