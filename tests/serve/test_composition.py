"""Blocks and layers of several widths leave as one checkpoint that transformers answers from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact.verification import ask_stock
from pipeline.composition.composed_plan import read_given_run
from pipeline.export.checkpoint import plan_checkpoint
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.composition.composed_runs import composed_run, every_other_group
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset
from tests.serve.environments import ask

TOKENS = np.random.default_rng(0).integers(5, 60, (2, 24)).astype(np.int32)
BITS = (3, 4)
# Read together, and so of one run.
ATTENTION = {"q_proj", "k_proj", "v_proj"}
GATES = {"gate_proj", "up_proj"}

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ObjectStore]:
    source = shared_preset("Llama3", num_blocks=2)
    return [
        finished_run(
            source,
            str(tmp_path_factory.mktemp(f"w{bits}")),
            {"mode": "gptq", "weight_bits": bits, "group_size": 8, "symmetric": True},
        )[0]
        for bits in BITS
    ]


@pytest.mark.parametrize("inside", [False, True], ids=["blocks", "layers"])
def test_a_composition_answers_in_transformers_as_in_stock_keras(
    runs: list[ObjectStore], inside: bool, tmp_path: Path
) -> None:
    picked = (1, 0)
    given = read_given_run(runs[0])
    layers = [every_other_group(given, n, 1 - run) for n, run in enumerate(picked)]
    run, manifest = composed_run(runs, picked, str(tmp_path / "out"), layers if inside else ())
    artifact = tmp_path / "out" / "artifact"
    checkpoint = plan_checkpoint(read_plan(run), read_preset(str(artifact)), "compressed-tensors")
    folder = tmp_path / "exported"
    write_checkpoint(checkpoint, run, manifest, open_store(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    found: dict[tuple[str, int], set[str]] = {}
    for group in config["quantization_config"]["config_groups"].values():
        for target in group["targets"]:
            block, module = target.split(".")[2], target.rpartition(".")[2]
            found.setdefault((block, group["weights"]["num_bits"]), set()).add(module)
    together, others = ATTENTION | GATES, {"o_proj", "down_proj"}
    expected = {
        ("0", 4): together if inside else together | others,
        ("1", 3): together if inside else together | others,
    }
    assert found == expected | ({("0", 3): others, ("1", 4): others} if inside else {})
    np.save(tmp_path / "tokens.npy", TOKENS)
    job = {"folder": folder, "inputs": tmp_path / "tokens.npy", "outputs": tmp_path / "out.npy"}
    ask("transformers", [{name: str(path) for name, path in job.items()}])
    [expected_output] = ask_stock([artifact], [TOKENS]).outputs
    output = np.load(tmp_path / "out.npy")
    assert np.abs(output - expected_output).max() < 1e-4 * np.abs(expected_output).max()
