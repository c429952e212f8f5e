"""A node's GPUs in at most eight minutes: right, the same twice, how fast, how much memory.

    make check-gpu                       (in the environment of `make venv-gpu`)
    python -m tests.cuda.check OUT [--tiny] [--budget 480] [--without-ray]

Writes OUT/report.json after every step, some kB, and prints a table of what was found beside what
it should be. Each step has a process of its own. What is compared between processes is compiled
anew by each; other steps take over what the first run of the pair compiled. A step for which no
time is left is skipped, and the report says so. `--tiny` runs every step on the CPU with small
shapes, where nothing is said of speed. Needs no network. Exit code 1 if anything fails.
Of a node with several GPUs the pair of blocks takes all, as one worker, and then one: the bytes
must be the same. `--without-ray` is for machines where Ray is not installed (see
`tests.cuda.pair_local`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.executor.protocol import Allocation
from pipeline.executor.worker_environment import worker_environment
from tests.cuda import pair
from tests.cuda.llama import LLAMA_8B, TINY
from tests.cuda.verdict import Verdict, judge, table

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to find out.

    Attributes:
        least_seconds: with less time left it is skipped.
        most_seconds: after which it is stopped.
    """

    name: str
    run: Callable[[float], Found]
    least_seconds: float
    most_seconds: float


class Check:
    """All steps, in the order in which they tell most."""

    def __init__(
        self, folder: Path, *, tiny: bool, with_ray: bool = True, gpus: int | None = None
    ) -> None:
        """Args: folder: for what steps write, gigabytes at 8B's size; removed by the caller.

        gpus: how many there are; None to find out.
        """
        self._folder = folder
        self._with_ray = with_ray
        self._device = "cpu" if tiny else "gpu"
        self._codes_size = 128 if tiny else 1024
        speeds = [[128, 128]] if tiny else [[4096, 4096], [14336, 4096], [4096, 14336]]
        self._shape = TINY if tiny else LLAMA_8B
        self._calibration = (
            pair.Calibration(num_samples=8, sequence_length=64, group_size=32)
            if tiny
            else pair.Calibration(num_samples=128, sequence_length=2048)
        )
        self.steps = (
            Step(name="facts", run=self._child("facts"), least_seconds=10, most_seconds=60),
            self._codes("cpu", "cpu"),
            self._codes(self._device, "1"),
            self._codes(self._device, "2"),
            Step(name="model", run=self._prepare, least_seconds=30, most_seconds=120),
            self._pair("bfloat16", "1", cache="kept"),
            Step(
                name="speed",
                run=self._child("speed", speeds, cache="kept"),
                least_seconds=20,
                most_seconds=120,
            ),
            self._pair("bfloat16", "2", cache="second"),
            self._pair("float32", "1", cache="kept"),
        )
        if (_number_of_gpus() if gpus is None else gpus) > 1:
            self.steps += (self._pair("bfloat16", "on one GPU", cache="kept", gpus=1),)

    def _codes(self, device: str, number: str) -> Step:
        place = self._folder / f"codes-{number}"
        place.mkdir(exist_ok=True)
        # With `--tiny` the first of the two takes over what the CPU's has compiled.
        compiled = "1" if number == "cpu" else number
        run = self._child(
            "codes", self._codes_size, str(place), device=device, cache=f"codes-{compiled}-compiled"
        )
        return Step(name=f"codes {number}", run=run, least_seconds=15, most_seconds=90)

    def _pair(self, dtype: str, number: str, *, cache: str, gpus: int | None = None) -> Step:
        """Args: gpus: None for all that there are."""
        name = f"pair {dtype} {number}"

        def run(limit_seconds: float) -> Found:
            if not (self._folder / "recipe.yaml").exists():
                return {"skipped": "the model was not written"}
            return pair.quantize(
                self._folder,
                name.replace(" ", "-"),
                pair.environment_of(_seeing(gpus), self._folder / cache),
                device=self._device,
                dtype=dtype,
                limit_seconds=limit_seconds,
                with_ray=self._with_ray,
            )

        return Step(name=name, run=run, least_seconds=60, most_seconds=240)

    def _prepare(self, _: float) -> Found:
        seconds = pair.prepare(self._folder, self._shape, self._calibration)
        return {"seconds": round(seconds, 2)}

    def _child(
        self, name: str, *arguments: Any, device: str = "", cache: str = "facts"
    ) -> Callable[[float], Found]:
        gpus = int((device or self._device) == "gpu")
        # Where the product keeps them in a cache of this name.
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self._folder / cache / "quantfleet" / "xla")}

        def run(limit_seconds: float) -> Found:
            threads = os.cpu_count() or 1
            environment = worker_environment(Allocation(workers=1, threads=threads, gpus=gpus))
            result = self._folder / "result.json"
            result.unlink(missing_ok=True)
            step = ["tests.cuda.steps", name, json.dumps(arguments), str(result)]
            try:
                done = subprocess.run(
                    [sys.executable, "-m", *step],
                    env=os.environ | environment | compiled,
                    capture_output=True,
                    text=True,
                    timeout=limit_seconds,
                )
                problem = done.stderr.strip()[-600:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after {limit_seconds:.0f} s"
            found: Found = json.loads(result.read_text()) if result.exists() else {}
            return found | ({"failed": problem} if problem else {})

        return run

    def verdicts(self, found: Found) -> list[Verdict]:
        return judge(found, self._folder, on_gpu=self._device == "gpu")


def carry_out(steps: Sequence[Step], budget_seconds: float, tell: Callable[[Found], None]) -> Found:
    """What each step found, or why it was skipped."""
    begin, found = time.monotonic(), {}
    for step in steps:
        left = budget_seconds - (time.monotonic() - begin)
        if left < step.least_seconds:
            found[step.name] = {
                "skipped": f"{max(left, 0):.0f} s left, and it needs {step.least_seconds:.0f}"
            }
        else:
            start = time.monotonic()
            one = step.run(min(left, step.most_seconds))
            found[step.name] = one | {"step_seconds": round(time.monotonic() - start, 1)}
        tell(found)
        print(f"{step.name}: {json.dumps(found[step.name])[:300]}", flush=True)
    return found


def _number_of_gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _seeing(gpus: int | None) -> dict[str, str]:
    """The environment of a process that sees so many GPUs; None for all."""
    environment = dict(os.environ)
    if gpus is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
    return environment


def _card() -> str:
    """What NVIDIA's own tool says of the GPUs here."""
    query = "--query-gpu=name,driver_version,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return (done.stdout or done.stderr).strip()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the report")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all steps")
    parser.add_argument("--without-ray", action="store_true", help="one worker, in one process")
    arguments = parser.parse_args(given)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "tiny": arguments.tiny,
        "budget_seconds": arguments.budget,
        "without_ray": arguments.without_ray,
        "card": _card(),
    }

    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        check = Check(Path(folder), tiny=arguments.tiny, with_ray=not arguments.without_ray)

        def tell(found: Found) -> None:
            verdicts = [verdict.to_dict() for verdict in check.verdicts(found)]
            whole = out / "report.json.new"
            report = about | {"steps": found, "verdicts": verdicts}
            whole.write_text(json.dumps(report, indent=1) + "\n")
            whole.replace(out / "report.json")

        verdicts = check.verdicts(carry_out(check.steps, arguments.budget, tell))
    print(table(about["card"], verdicts))
    return 1 if any(verdict.passed is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
