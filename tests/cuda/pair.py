"""Two blocks of an 8B Llama through `quantfleet quantize`, as a user would run it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cuda.llama import Shape, write_model, write_text

_COMMAND = "from jobs.cli.start import main; main()"
_STOP_SECONDS = 15.0
# Of Llama 3.1 8B.
_BLOCKS = 32

_RECIPE = """\
name: check-w4-g{group_size}
scheme: {{mode: gptq, weight_bits: 4, group_size: {group_size}, activation_order: true,
  refinement_sweeps: 2}}
embeddings: {{mode: int8}}
calibration:
  texts: [{texts}]
  num_samples: {num_samples}
  sequence_length: {sequence_length}
"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    num_samples: int
    sequence_length: int
    group_size: int = 128


def prepare(folder: Path, shape: Shape, calibration: Calibration) -> float:
    """Write model, texts and recipe; returns the seconds that it took."""
    start = time.monotonic()
    write_model(folder / "model", shape)
    texts = folder / "texts.txt"
    # Each window has a token of its own at its start.
    write_text(texts, (calibration.num_samples + 1) * calibration.sequence_length)
    (folder / "recipe.yaml").write_text(
        _RECIPE.format(
            texts=texts,
            num_samples=calibration.num_samples,
            sequence_length=calibration.sequence_length,
            group_size=calibration.group_size,
        )
    )
    return time.monotonic() - start


def quantize(
    folder: Path,
    name: str,
    environment: Mapping[str, str],
    *,
    device: str,
    dtype: str,
    limit_seconds: float,
    with_ray: bool = True,
) -> dict[str, Any]:
    """Run the command on what `prepare` wrote, and say what came of it.

    Args:
        with_ray: False runs `tests.cuda.pair_local` instead.
    """
    output = folder / (name if with_ray else f"{name}-alone")
    model, recipe = str(folder / "model"), str(folder / "recipe.yaml")
    if with_ray:
        command = [sys.executable, "-c", _COMMAND, "quantize", model]
        command += ["--recipe", recipe, "--output", str(output), "--json"]
        command += ["--device", device, "--workers", "1", "--dtype", dtype]
    else:
        command = [sys.executable, "-m", "tests.cuda.pair_local"]
        command += [model, recipe, str(output), device, dtype]
    start = time.monotonic()
    with (folder / f"{name}.out").open("w+") as stdout, (folder / f"{name}.err").open("w+") as log:
        process = subprocess.Popen(command, env=dict(environment), stdout=stdout, stderr=log)
        timed_out = not _wait(process, limit_seconds)
        seconds = time.monotonic() - start
        stdout.seek(0)
        log.seek(0)
        said, told = stdout.read(), log.read()
    found: dict[str, Any] = {"process_seconds": round(seconds, 2), **_events(output)}
    if timed_out:
        return found | {"failed": f"stopped after {limit_seconds:.0f} s; {_end(told)}"}
    if process.returncode:
        return found | {"failed": f"exit code {process.returncode}; {_end(told)}"}
    summary = json.loads(said)
    plan = json.loads((output / "plan.json").read_text())["content"]
    return found | {
        "run_seconds": round(summary["wall_seconds"], 2),
        "forward": plan.get("forward_dtype", "float32"),
        "attention": plan["tokens"].get("attention", "scores"),
        "estimated_device_bytes": summary["device_bytes"],
        "device_peak_bytes": summary["device_peak_bytes"],
        "files": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((output / "artifact").glob("*.h5"))
        },
        "model_seconds": round(seconds + (_BLOCKS - 2) * found["block_seconds"], 1),
    }


def _wait(process: subprocess.Popen[bytes], limit_seconds: float) -> bool:
    """Whether the process ended in time; it is stopped otherwise, gently if it can be."""
    try:
        process.wait(limit_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()
        process.wait()
        return False
    return True


def _events(output: Path) -> dict[str, Any]:
    """Seconds by stage, all blocks together, and of the second block, which compiles nothing."""
    seconds: Counter[str] = Counter()
    committed: dict[int, datetime.datetime] = {}
    for file in sorted((output / "events").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            seconds.update(event.get("seconds", {}))
            if event["event"] == "committed":
                committed[event["part"]] = datetime.datetime.fromisoformat(event["time"])
    found: dict[str, Any] = {"stage_seconds": {n: round(s, 2) for n, s in sorted(seconds.items())}}
    if {1, 2} <= committed.keys():
        found["block_seconds"] = round((committed[2] - committed[1]).total_seconds(), 2)
    return found


def _end(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "without a word"


def environment_of(given: Mapping[str, str], cache: Path) -> dict[str, str]:
    """A user's environment, with compiled programs kept in a folder of its own."""
    kept = {name: value for name, value in given.items() if not name.startswith(("JAX_", "XLA_"))}
    return kept | {
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), given.get("PYTHONPATH")))),
    }
