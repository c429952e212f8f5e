"""An artifact of a given size, made of the blocks of finished runs, that is a run like any other."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.compose
import jobs.quantize
from jobs.execute import Compute
from pipeline.composition.decision import Decision
from pipeline.composition.sensitivities import Sensitivity
from pipeline.executor.protocol import Allocation, ComputeSpec
from pipeline.plan import read_plan
from pipeline.run.commits import read_manifest
from pipeline.run.records import PartRecord, file_key, record_key
from pipeline.storage.object_store import open_store
from pipeline.worker.model_state import ModelState
from pipeline.worker.streamed_model import artifact_model
from tests.integration.quantized import FinishedRun, answer, distance, finished_run, recipe
from tests.integration.test_cli_quantize import Command, LateExecutor
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import NUM_BLOCKS, lasting, text_file
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme

SCHEMES: dict[str, Scheme] = {
    "w2": GPTQScheme(weight_bits=2, group_size=16, scale_search=False),
    "w4": GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    "int8": Int8Scheme(),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """A finished run for each scheme."""
    folder = tmp_path_factory.mktemp("runs")
    source = shared_preset("Llama3", num_blocks=NUM_BLOCKS)
    return {
        name: finished_run(source, recipe(scheme, name=name), folder / name)
        for name, scheme in SCHEMES.items()
    }


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command line, with workers in this process."""

    @contextlib.contextmanager
    def open_compute(
        spec: ComputeSpec, source_url: str, run_url: str, **_: Any
    ) -> Iterator[Compute]:
        allocation = Allocation(workers=2, threads=1)
        yield Compute(allocation, lambda: LateExecutor(2, source_url, run_url))

    monkeypatch.setattr(jobs.compose, "open_compute", open_compute)
    monkeypatch.setattr(jobs.quantize, "open_compute", open_compute)
    return Command(capsys)


def bits_of(run: FinishedRun) -> float:
    records = [PartRecord.read(run.store, record_key(p)) for p in range(1, NUM_BLOCKS + 1)]
    weights = sum(part.num_weights for part in run.plan.parts[1:])
    return 8 * sum(record.size_bytes for record in records) / weights


def test_a_composition_is_a_run_of_the_wanted_size(
    runs: dict[str, FinishedRun], command: Command, tmp_path: Path
) -> None:
    folders = [run.folder for run in runs.values()]
    bits = [bits_of(run) for run in runs.values()]
    assert bits == sorted(bits)
    wanted = (2 * bits[0] + bits[2]) / 3
    target = ("--target-bits", f"{wanted:.4f}", "--output", tmp_path / "out")
    texts = ("--measure-windows", "4", "--evaluate-on", text_file(), "--windows", "2")
    assert command("compose", *folders, *target, *texts, "--json") in (0, 6), command.err
    found = json.loads(command.out)
    assert found["choice"]["bits"] <= wanted
    assert found["choice"]["num_bytes"] == found["decision"]["size_bytes"]
    assert command("verify", tmp_path / "out", "--no-stock") == 0
