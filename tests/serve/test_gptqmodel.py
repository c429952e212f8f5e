"""GPTQModel, in its own environment, answers as stock KerasHub does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pipeline.artifact.verification import ask_stock
from pipeline.export.checkpoint import plan_checkpoint
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset
from tests.serve.environments import ask

TOKENS = np.random.default_rng(0).integers(5, 60, (2, 24)).astype(np.int32)

pytestmark = [pytest.mark.serve, pytest.mark.timeout(3600)]


def gptq(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"mode": "gptq", "weight_bits": bits, "group_size": 32, "symmetric": symmetric}


AWQ = {"mode": "awq", "group_size": 32, "foldable": True}
CASES = [("Llama3", gptq(bits, symmetric)) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
# Three layers in one transposed matrix.
CASES += [("GPT2", gptq(4, True)), ("GPT2", gptq(3, False)), ("GPT2", AWQ), ("Llama3", AWQ)]


def test_gptqmodel_answers_as_stock_keras_does(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    jobs, presets = [], []
    for number, (architecture, scheme) in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = shared_preset(architecture, num_blocks=2, intermediate_dim=256)
        run, manifest = finished_run(source, str(folder / "run"), scheme)
        artifact = read_preset(f"{run.root_url}/artifact")
        checkpoint = plan_checkpoint(read_plan(run), artifact, "gptq", dtype="float16")
        write_checkpoint(checkpoint, run, manifest, open_store(str(folder / "gptq")))
        _add_tokenizer(folder / "gptq")
        presets.append(folder / "run" / "artifact")
        inputs, outputs = str(tmp_path / "tokens.npy"), str(folder / "answer.npy")
        jobs.append({"folder": str(folder / "gptq"), "inputs": inputs, "outputs": outputs})
    ask("gptqmodel", jobs)
    expected = ask_stock(presets, [TOKENS] * len(presets)).outputs
    for case, job, keras in zip(CASES, jobs, expected, strict=True):
        distance = np.abs(np.load(job["outputs"]) - keras).max() / np.abs(keras).max()
        # It computes in float16.
        assert distance < 0.005, case


def _add_tokenizer(folder: Path) -> None:
    # GPTQModel loads no model without one.
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "a", "eos_token": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
