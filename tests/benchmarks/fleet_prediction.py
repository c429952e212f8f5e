"""A small real catalog: what a dry run says its night takes, beside what the night took.

    KERAS_BACKEND=jax python -m tests.benchmarks.fleet_prediction [--nights 4]

Three random Llamas of 256 to 768 features, in gptq and int8, five runs in all. Between nights one
byte of each model changes, so that all is made again: from the second night on, what earlier nights
took corrects the model, and from the third on that is of runs that compiled nothing. There is a dry
run before the first night, whose programs are still to be compiled, and before the last, by which
the prediction is judged. What is predicted is the sum over all runs, with start, planning and
evaluation, and what past nights took beside their runs; what is measured is the whole command. At
the end stands what is left to explain, phase by phase. Run it while the machine has nothing else to
do: the first night is predicted from how fast the machine is right then, and the last from how fast
it was.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from jobs.catalog.request import run_store
from pipeline.planning.run_cost import UNTIMED
from pipeline.run.events import read_events
from pipeline.storage.object_store import ObjectStore, open_store
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


def _nightly(catalog: Path, *options: str) -> Command:
    """Run the command, and read what it says."""
    words = [sys.executable, "-m", "jobs.cli.start", "nightly", str(catalog), *options, "--json"]
    began = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryFile("w+") as told:
        finished = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=told,
            check=False,
            env=os.environ | {"QUANTFLEET_LOG": "json"},
        )
        ended = datetime.datetime.now(datetime.UTC)
        told.seek(0)
        lines = told.read().splitlines()
    if finished.returncode:
        raise SystemExit("\n".join([*lines[-20:], f"exit code {finished.returncode}"]))
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return Command(began=began, ended=ended, events=events, found=json.loads(finished.stdout))


@dataclass(frozen=True, kw_only=True)
class Command:
    """One run of the command.

    Attributes:
        events: what it logged.
        found: what it says of each run.
    """

    began: datetime.datetime
    ended: datetime.datetime
    events: list[dict[str, Any]]
    found: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return (self.ended - self.began).total_seconds()

    @property
    def predicted_seconds(self) -> float:
        """Of a dry run: for all runs, and what past nights took beside theirs."""
        seconds: float = sum(one["cost"]["seconds"] for one in self.found)
        return seconds + self.predicted(_OUTSIDE)

    def predicted(self, phase: str) -> float:
        """Of a dry run: for one phase of all runs."""
        if phase == _OUTSIDE:
            return sum(one["seconds"] for one in self.events if one["event"] == "pass")
        seconds: float = sum(
            stage["seconds"]
            for one in self.found
            for stage in one["cost"]["stages"]
            if _phase_of(stage["name"]) == phase
        )
        return seconds

    def time_of(self, run_id: str, event: str) -> datetime.datetime:
        """Of a night: when it logged something of a run."""
        times = [
            one["time"] for one in self.events if (one.get("run"), one["event"]) == (run_id, event)
        ]
        return datetime.datetime.fromisoformat(times[-1])

    def measured(self, root: ObjectStore) -> dict[str, float]:
        """Of a night: seconds by phase, and outside all runs."""
        found = dict.fromkeys(_PHASES, 0.0)
        for one in self.found:
            run_id = one["run_id"]
            events = {event.name: event.time for event in read_events(run_store(root, run_id))}
            moments = (
                self.time_of(run_id, "stale"),
                events["started"],
                events["sealed"],
                self.time_of(run_id, "published"),
            )
            for phase, (start, end) in zip(_PHASES, itertools.pairwise(moments), strict=True):
                found[phase] += (end - start).total_seconds()
        return found | {_OUTSIDE: self.seconds - sum(found.values())}


_PHASES = ("start, plan", "claim to manifest", "evaluate, publish")
_OUTSIDE = "outside the runs"


def _phase_of(stage: str) -> str:
    if stage not in UNTIMED:
        return _PHASES[1]
    return _PHASES[2] if stage == "evaluate" else _PHASES[0]


def _change(folder: Path) -> None:
    for name in _MODELS:
        with (folder / name / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)  # the low byte of a number: it stays finite
            [byte] = file.read(1)
            file.seek(-2, 2)
            file.write(bytes([byte ^ 1]))


def _row(what: str, predicted: float, measured: float) -> str:
    ratio = f"{predicted / measured:.2f}" if predicted else "–"
    return f"| {what} | {predicted:.0f} s | {measured:.0f} s | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=4)
    nights = parser.parse_args().nights
    print("| night | predicted | measured | predicted / measured |")
    print("| ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalog = _write_catalog(folder)
        root = open_store(str(folder / "fleet"))
        for night in range(1, nights + 1):
            foreseen = _nightly(catalog, "--dry-run") if night in (1, nights) else None
            made = _nightly(catalog)
            if any(one["result"] != "published" for one in made.found):
                raise SystemExit(f"not all was made: {[one['text'] for one in made.found]}")
            if foreseen is None:
                print(f"| {night} | not asked | {made.seconds:.0f} s | |", flush=True)
                _change(folder)
                continue
            corrected = sum(one["cost"].get("corrected_by", 0) for one in foreseen.found)
            by = f", corrected by {corrected} runs" if corrected else ""
            print(_row(f"{night}{by}", foreseen.predicted_seconds, made.seconds), flush=True)
            if night < nights:
                _change(folder)
        if foreseen is not None:
            measured = made.measured(root)
            print(f"\n| night {nights}, all runs together | predicted | measured | ratio |")
            print("| --- | ---: | ---: | ---: |")
            for phase, seconds in measured.items():
                print(_row(phase, foreseen.predicted(phase), seconds))


if __name__ == "__main__":
    main()
