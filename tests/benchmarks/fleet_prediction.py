"""A small real catalog: what a dry run says its night takes, beside what the night took.

    KERAS_BACKEND=jax python -m tests.benchmarks.fleet_prediction [--nights 4]

Three random Llamas of 256 to 768 features, in gptq and int8, five runs in all. Each night follows
a dry run of the same catalog, and then one byte of each model changes, so that all is made again:
from the second night on, what earlier nights took corrects the model. What is predicted is the sum
over all runs, with start, planning and evaluation; what is measured is the whole command. Run it
while the machine has nothing else to do: it is predicted from how fast the machine is right then.
Only the first night compiles; from the fourth on, the median of those before is of one that
did not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.models.large_shapes import large_folder

_MODELS = {"small": (6, 256), "middle": (6, 512), "large": (8, 768)}
"""Blocks, and features."""
_RECIPES = {"small": ["gptq"], "middle": ["gptq", "int8"], "large": ["gptq", "int8"]}


def _write_catalog(folder: Path) -> Path:
    (folder / "texts.txt").write_text("\n\n".join(topics.values()))
    lines = [f"root: {folder / 'fleet'}", "models:"]
    for name, (blocks, hidden) in _MODELS.items():
        large_folder(
            folder / name,
            "llama-3-8b",
            filled=True,
            num_hidden_layers=blocks,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            vocab_size=4096,
        )
        recipes = ", ".join("int8" if x == "int8" else _gptq(folder) for x in _RECIPES[name])
        lines.append(f"  - {{name: {name}, preset: {folder / name}, recipes: [{recipes}]}}")
    catalog = folder / "catalog.yaml"
    catalog.write_text("\n".join([*lines, ""]))
    return catalog


def _gptq(folder: Path) -> str:
    return (
        "{name: gptq, scheme: {mode: gptq, weight_bits: 4, group_size: 64}, embeddings: {mode: "
        f"int8}}, calibration: {{texts: [{folder / 'texts.txt'}], num_samples: 16, "
        "sequence_length: 512}}"
    )


def _nightly(catalog: Path, *options: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the command, and what it says."""
    command = [sys.executable, "-m", "jobs.cli.start", "nightly", str(catalog), *options, "--json"]
    start = time.monotonic()
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.monotonic() - start, json.loads(finished.stdout)


def _change(folder: Path) -> None:
    for name in _MODELS:
        with (folder / name / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)  # the low byte of a number: it stays finite
            [byte] = file.read(1)
            file.seek(-2, 2)
            file.write(bytes([byte ^ 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=4)
    nights = parser.parse_args().nights
    print("| night | corrected by runs | predicted | measured | predicted / measured |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = _write_catalog(folder)
        for night in range(nights):
            _, foreseen = _nightly(catalog, "--dry-run")
            costs = [one["cost"] for one in foreseen]
            measured, made = _nightly(catalog)
            if any(one["result"] != "published" for one in made):
                raise SystemExit(f"not all was made: {[one['text'] for one in made]}")
            predicted = sum(cost["seconds"] for cost in costs)
            corrected = sum(cost.get("corrected_by", 0) for cost in costs)
            print(
                f"| {night + 1} | {corrected} | {predicted:.0f} s | {measured:.0f} s | "
                f"{predicted / measured:.2f} |",
                flush=True,
            )
            _change(folder)


if __name__ == "__main__":
    main()
