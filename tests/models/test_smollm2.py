"""SmolLM2, read from its GGUF file, behaves as a language model."""

from __future__ import annotations

import json
from pathlib import Path

import keras_hub
import numpy as np
import pytest

from tests.models.smollm2 import perplexity, smollm2_preset
from tests.models.smollm2_huggingface import smollm2_directory
from tests.models.smollm2_weights import read_checkpoint

PROSE = (
    "The Moon is the only natural satellite of the Earth. It goes around the Earth once in about "
    "a month, and the same side always faces us. People first walked on it in July 1969, when two "
    "astronauts stepped out of their spacecraft and spent a few hours collecting rocks and taking "
    "photographs."
)


@pytest.mark.exhaustive
def test_the_real_model_writes_and_reads_plausible_english(tmp_path: Path) -> None:
    preset = smollm2_preset(tmp_path / "preset", dtype="bfloat16")
    task = keras_hub.models.CausalLM.from_preset(str(preset), dtype="float32")
    assert perplexity(task, [PROSE]) < 20
    assert perplexity(task, [" ".join(reversed(PROSE.split()))]) > 100
    task.compile(sampler="greedy")
    assert "Paris" in task.generate("The capital of France is", max_length=12)
    # The second call leaves the files alone, and another model is refused.
    before = (preset / "model.weights.h5").stat().st_mtime_ns
    assert smollm2_preset(preset, dtype="bfloat16") == preset
    assert (preset / "model.weights.h5").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="dither"):
        smollm2_preset(preset, dtype="bfloat16", dither=True)
    config = json.loads((preset / "config.json").read_text())["config"]
    assert config["tie_word_embeddings"] is True
    assert config["layer_norm_epsilon"] == 1e-5


@pytest.mark.exhaustive
def test_kerashub_converts_the_hugging_face_directory_to_the_same_weights(tmp_path: Path) -> None:
    directory = smollm2_directory(tmp_path / "huggingface", num_blocks=1)
    converted = keras_hub.models.Llama3Backbone.from_preset(str(directory))
    preset = smollm2_preset(tmp_path / "preset", num_blocks=1)
    ours = keras_hub.models.Llama3Backbone.from_preset(str(preset))
    for theirs, weight in zip(converted.weights, ours.weights, strict=True):
        assert theirs.path == weight.path
        np.testing.assert_array_equal(np.asarray(theirs.value), np.asarray(weight.value))


@pytest.mark.exhaustive
def test_dither_spreads_the_weights_over_their_cells() -> None:
    name = "blk.0.ffn_up.weight"
    coded = read_checkpoint(num_blocks=1).weights
    dithered = read_checkpoint(dither=True, num_blocks=1).weights
    group = np.s_[3, 32:64]
    assert len(np.unique(coded[name][group])) <= 16
    assert len(np.unique(dithered[name][group])) == 32
    levels = np.unique(coded[name][group])
    cell = np.diff(levels).min()
    assert np.abs(dithered[name] - coded[name])[group].max() <= cell / 2 * 1.001  # float16's scale
    np.testing.assert_array_equal(dithered["token_embd.weight"], coded["token_embd.weight"])
