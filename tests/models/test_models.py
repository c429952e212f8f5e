"""Stock KerasHub reads the tests' models, which are the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import jax
import keras_hub
import numpy as np
import pytest

from tests.models.stock_load import load_stock
from tests.models.tiny import ARCHITECTURES, tiny_preset
from tests.selection import by_default

# KerasHub's SentencePiece tokenizer leaves its file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*vocabulary.spm:ResourceWarning")

TEXT = "The lazy dog sleeps, and 42 foxes in Köln jump over it."


def load_task(architecture: str, preset: Path, **options: Any) -> Any:
    task_class = getattr(keras_hub.models, ARCHITECTURES[architecture].task)
    return load_stock(task_class, preset, **options)


def logits(task: Any, preset: Path) -> np.ndarray:
    """Logits of TEXT, [tokens, vocabulary] in float32."""
    tokenizer = keras_hub.models.Tokenizer.from_preset(str(preset))
    token_ids = np.asarray(tokenizer(TEXT))[None]
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    if "mask_positions" in task.input:
        positions = np.arange(token_ids.shape[1])[None]
        inputs |= {"segment_ids": np.zeros_like(token_ids), "mask_positions": positions}
    call = jax.jit(task.stateless_call)  # one compilation instead of one per operation
    outputs, _ = call(
        [weight.value for weight in task.trainable_variables],
        [weight.value for weight in task.non_trainable_variables],
        inputs,
    )
    return np.asarray(outputs[0], np.float32)


def digests(preset: Path) -> dict[str, str]:
    files = sorted(file for file in preset.rglob("*") if file.is_file())
    return {
        str(file.relative_to(preset)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.mark.parametrize("architecture", by_default(ARCHITECTURES, []))
def test_stock_kerashub_reads_a_tiny_model_and_its_logits_vary(
    architecture: str, tmp_path: Path
) -> None:
    preset = tiny_preset(architecture, tmp_path / "preset")
    task = load_task(architecture, preset)
    logits_TV = logits(task, preset)
    assert np.isfinite(logits_TV).all()
    # Over the vocabulary, and from one position to another.
    assert logits_TV.std(axis=1).min() > 0.3
    assert len(set(logits_TV.argmax(axis=1))) > 3
    assert (task.preprocessor is None) is not ARCHITECTURES[architecture].preprocesses


@pytest.mark.parametrize("architecture", by_default(ARCHITECTURES, ["Gemma", "Llama3"]))
def test_a_tiny_tokenizer_spells_what_it_reads(architecture: str, tmp_path: Path) -> None:
    preset = tiny_preset(architecture, tmp_path / "preset", num_blocks=1)
    tokenizer = keras_hub.models.Tokenizer.from_preset(str(preset))
    token_ids = np.asarray(tokenizer(TEXT))
    assert token_ids.min() >= 0
    assert token_ids.max() < tokenizer.vocabulary_size()
    if architecture != "Bert":  # WordPiece forgets case and spaces
        assert str(tokenizer.detokenize(token_ids)).strip() == TEXT


@pytest.mark.parametrize("architecture", by_default(["Llama3", "Qwen3"], ["Llama3"]))
def test_the_head_is_tied_unless_asked_otherwise(architecture: str, tmp_path: Path) -> None:
    preset = tiny_preset(architecture, tmp_path / "preset", num_blocks=1)
    assert len(load_task(architecture, preset).backbone.token_embedding.weights) == 1
    preset = tiny_preset(architecture, tmp_path / "untied", num_blocks=1, tied=False)
    assert len(load_task(architecture, preset).backbone.token_embedding.weights) == 2


@pytest.mark.exhaustive
def test_half_precision_is_stored_and_read(tmp_path: Path) -> None:
    whole = tiny_preset("OPT", tmp_path / "float32")
    exact = logits(load_task("OPT", whole), whole)
    for dtype in ("float16", "bfloat16"):
        preset = tiny_preset("OPT", tmp_path / dtype, dtype=dtype)
        policy = json.loads((preset / "config.json").read_text())["config"]["dtype"]
        assert policy["config"]["name"] == dtype
        assert (preset / "model.weights.h5").stat().st_size < 0.7 * (
            whole / "model.weights.h5"
        ).stat().st_size
        # The same weights, rounded. Read as float32: XLA cannot multiply float16 on a CPU.
        rounded = logits(load_task("OPT", preset), preset)
        assert 0 < np.abs(rounded - exact).max() < 0.2


@pytest.mark.exhaustive
def test_a_tiny_model_generates(tmp_path: Path) -> None:
    task = load_task("Llama3", tiny_preset("Llama3", tmp_path / "preset"))
    task.compile(sampler="greedy")
    generated = task.generate("the dog", max_length=12)
    assert generated.startswith("the dog")
    assert len(generated) > len("the dog")


def test_num_blocks_and_widths_are_as_asked(tmp_path: Path) -> None:
    preset = tiny_preset(
        "GPT2", tmp_path / "preset", num_blocks=3, hidden_dim=32, intermediate_dim=96
    )
    with h5py.File(preset / "model.weights.h5") as file:
        layers = file["layers"]
        assert len([name for name in layers if name.startswith("transformer_decoder")]) == 3
        assert layers["transformer_decoder_2/_feedforward_output_dense/vars/0"].shape == (96, 32)


@pytest.mark.exhaustive
def test_a_tiny_model_depends_on_its_seed_alone(tmp_path: Path) -> None:
    one = digests(tiny_preset("Llama3", tmp_path / "one"))
    # Another process, whose sets are ordered differently.
    code = f"from tests.models.tiny import *; tiny_preset('Llama3', {str(tmp_path / 'two')!r})"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "KERAS_BACKEND": "jax"}
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
    assert digests(tmp_path / "two") == one
    other = digests(tiny_preset("Llama3", tmp_path / "other", seed=1))
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {"metadata.json", "model.weights.h5"}
