"""A Hugging Face folder of a mixture of experts, from its tensors to stock Keras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantizer.schemes import GPTQScheme
from tests.integration.quantized import distance, finished_run, recipe
from tests.integration.stock_session import assert_same, stock_session
from tests.models.tiny_huggingface import tiny_huggingface, write_json
from tests.models.transformers_answers import folder_of
from tests.pipeline.artifacts import load

pytestmark = [
    pytest.mark.exhaustive,
    # KerasHub leaves files of vocabularies open.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


def mixtral(folder: Path, scratch: Path) -> Path:
    """A tiny one with the vocabulary of a tiny Mistral."""
    folder_of("mixtral, as saved", folder)
    tiny_huggingface(scratch, "mistral", tokenizer=True)
    size = json.loads((scratch / "config.json").read_text())["vocab_size"]
    (scratch / "tokenizer.model").rename(folder / "tokenizer.model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = tensors[name]
        tensors[name] = np.tile(table, (-(-size // len(table)), 1))[:size]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"vocab_size": size})
    return folder


def test_a_mixtral_of_hugging_face_is_quantized(tmp_path: Path) -> None:
    folder = mixtral(tmp_path / "in", tmp_path / "mistral")
    wanted = recipe(GPTQScheme(group_size=8)).model_copy(update={"allow_partial": True})
    run = finished_run(folder, wanted, tmp_path / "run")
    assert run.plan.task == "MixtralCausalLM"
    with stock_session(tmp_path) as stock:
        assert_same(run, stock)
    loaded = load(run.artifact).backbone
    given = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")
    banks = [
        (found.value, expected.value)
        for found, expected in zip(_banks(loaded), _banks(given), strict=True)
    ]
    assert len(banks) == 3 * run.plan.num_blocks
    assert max(distance(found, expected) for found, expected in banks) < 0.2  # of 4 bits


def _banks(backbone: Any) -> list[Any]:
    return [v for v in backbone.variables if "experts" in v.path and len(v.shape) == 3]
