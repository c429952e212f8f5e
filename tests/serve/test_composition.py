"""Blocks of several widths leave as one checkpoint, which transformers answers from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact.verification import ask_stock
from pipeline.export.checkpoint import plan_checkpoint
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.pipeline.composition.composed_runs import composed_run
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset
from tests.serve.environments import ask

TOKENS = np.random.default_rng(0).integers(5, 60, (2, 24)).astype(np.int32)

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]


def test_a_composition_answers_in_transformers_as_in_stock_keras(tmp_path: Path) -> None:
    source = shared_preset("Llama3", num_blocks=2)
    runs = [
        finished_run(
            source,
            str(tmp_path / f"w{bits}"),
            {"mode": "gptq", "weight_bits": bits, "group_size": 8, "symmetric": True},
        )[0]
        for bits in (3, 4)
    ]
    run, manifest = composed_run(runs, [1, 0], str(tmp_path / "out"))
    artifact = tmp_path / "out" / "artifact"
    checkpoint = plan_checkpoint(read_plan(run), read_preset(str(artifact)), "compressed-tensors")
    folder = tmp_path / "exported"
    write_checkpoint(checkpoint, run, manifest, open_store(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    targets = {
        group["weights"]["num_bits"]: {target.split(".")[2] for target in group["targets"]}
        for group in groups
    }
    assert targets == {3: {"1"}, 4: {"0"}}
    np.save(tmp_path / "tokens.npy", TOKENS)
    job = {"folder": folder, "inputs": tmp_path / "tokens.npy", "outputs": tmp_path / "out.npy"}
    ask("transformers", [{name: str(path) for name, path in job.items()}])
    [expected] = ask_stock([artifact], [TOKENS]).outputs
    found = np.load(tmp_path / "out.npy")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
