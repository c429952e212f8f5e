from __future__ import annotations

import json
from dataclasses import replace

import keras_hub
import pytest
from tokenizers import Tokenizer

from pipeline.model.checkpoint_tokenizer import checkpoint_tokenizer
from pipeline.model.preset import read_preset
from tests.pipeline.presets import shared_preset

TEXTS = ("The man, and the  dog; it's 1234\n\nhere", "naïve café 東京 🙂", "a<|endoftext|>b")


@pytest.mark.parametrize("architecture", ["Llama3", "GPT2", "Qwen3"])
def test_byte_pairs_split_texts_as_kerashub_does(architecture: str) -> None:
    preset = shared_preset(architecture)
    found = checkpoint_tokenizer(read_preset(str(preset)))
    written = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    ours = keras_hub.tokenizers.Tokenizer.from_preset(str(preset))
    start = getattr(ours, "start_token_id", None)
    for text in TEXTS:
        tokens = [int(token) for token in ours(text)]
        assert written.encode(text).ids == [*([] if start is None else [start]), *tokens]
        assert written.encode(text, add_special_tokens=False).ids == tokens
    config = json.loads(found.files["tokenizer_config.json"])
    assert config["eos_token"] == ours.end_token
    assert found.ids["eos_token_id"] == ours.end_token_id


def test_a_text_begins_with_start_only_where_the_preprocessor_says_so() -> None:
    preset = read_preset(str(shared_preset("Llama3")))
    settings = json.dumps({"config": {"add_start_token": False}}).encode()
    changed = replace(preset, json_files={**preset.json_files, "preprocessor.json": settings})
    found = checkpoint_tokenizer(changed)
    assert Tokenizer.from_str(found.files["tokenizer.json"].decode()).encode("the").ids[0] != 0


@pytest.mark.parametrize("architecture", ["Bert", "Gemma"])
def test_other_tokenizers_are_left_out(architecture: str) -> None:
    preset = read_preset(str(shared_preset(architecture)))
    assert checkpoint_tokenizer(preset).files == {}
