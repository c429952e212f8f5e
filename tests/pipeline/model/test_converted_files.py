"""What an artifact made from a Hugging Face model has beside its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras_hub
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.errors import SourceError
from pipeline.model.preset import read_preset
from pipeline.model.preset_json import converted_files, quantized_json
from pipeline.model.skeleton import build_skeleton
from tests.benchmarks.minilm import preset_folder
from tests.models.tiny_huggingface import tiny_huggingface

TEXTS = ["The quick brown fox.", "Naïve café, 3.14!", "<|im_start|>user"]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<file>", "<repo>")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
DISTILBERT = {
    "architectures": ["DistilBertModel"],
    "model_type": "distilbert",
    "dim": 32,
    "dropout": 0.1,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
    "n_heads": 4,
    "n_layers": 2,
    "tie_weights_": True,
    "tokenizer_class": "DistilBertTokenizer",
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with special tokens of its own, as SmolLM2 and many others have."""
    folder = tmp_path / "llama"
    folder.mkdir()
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "config.json", LLAMA | {"vocab_size": len(tokens)})
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    write(folder / "tokenizer_config.json", special)
    return folder


@pytest.fixture
def distilbert(tmp_path: Path) -> Path:
    """Of a family for which KerasHub has no text embedder."""
    folder = tmp_path / "distilbert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "quick", "fox", "."]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write(folder / "config.json", DISTILBERT | {"vocab_size": len(words)})
    write(folder / "tokenizer_config.json", {"do_lower_case": True})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def convert(source: Path) -> dict[str, bytes]:
    preset = read_preset(str(source))
    return converted_files(preset, build_skeleton(preset))


def unpack(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_an_encoder_s_preprocessor_makes_the_same_of_text(tmp_path: Path) -> None:
    files = convert(preset_folder())
    kind = keras_hub.models.TextEmbedderPreprocessor
    expected = kind.from_preset(str(preset_folder()))(TEXTS)
    found = kind.from_preset(str(unpack(files, tmp_path)))(TEXTS)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] == expected[name]).all(), name


def test_the_task_is_given_its_preprocessor(llama: Path) -> None:
    for source in (llama, preset_folder()):
        files = convert(source)
        task = json.loads(files["task.json"])
        assert task["config"]["preprocessor"] == json.loads(files["preprocessor.json"])
        assert task["config"]["backbone"] == json.loads(files["config.json"])


def test_special_tokens_of_its_own_survive(llama: Path, tmp_path: Path) -> None:
    preset = unpack(convert(llama), tmp_path / "preset")
    original = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(preset))
    assert tokenizer.start_token_id == original.token_to_id("<|im_start|>")
    assert tokenizer.end_token_id == original.token_to_id("<|im_end|>")
    for text in TEXTS:
        assert [int(token) for token in tokenizer(text)] == original.encode(text).ids


def test_bytes_depend_on_nothing_but_the_source(llama: Path, tmp_path: Path) -> None:
    """Neither on what this process built before, nor on the order that its sets have."""
    files = convert(llama)
    assert convert(llama) == files
    script = (
        "import sys; from pathlib import Path; "
        "from tests.pipeline.model.test_converted_files import *; "
        "unpack(convert(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(llama), str(tmp_path / "other")],
        env={**os.environ, "PYTHONHASHSEED": "1" if hash("a") % 2 else "2"},
        cwd=Path(__file__).parents[3],
        check=True,
    )
    for name, content in files.items():
        assert (tmp_path / "other" / name).read_bytes() == content, name


def test_without_a_vocabulary_there_are_token_ids_alone(llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    files = convert(llama)
    assert sorted(files) == ["config.json", "task.json"]
    assert json.loads(files["task.json"])["config"]["preprocessor"] is None


def test_a_task_is_found_for_a_backbone_that_has_no_usual_one(distilbert: Path) -> None:
    files = convert(distilbert)
    assert "task.json" not in files
    assert "assets/tokenizer/vocabulary.txt" in files
    task = json.loads(quantized_json(files, {})["task.json"])
    assert task["class_name"] == "DistilBertMaskedLM"
    assert task["config"]["preprocessor"]["class_name"] == "DistilBertMaskedLMPreprocessor"


def test_a_tokenizer_that_does_not_convert_is_refused_in_a_line(llama: Path) -> None:
    write(llama / "tokenizer_config.json", {"bos_token": "<absent>", "eos_token": "<|im_end|>"})
    with pytest.raises(SourceError, match=r"cannot convert its tokenizer.*<absent>") as refused:
        convert(llama)
    assert str(refused.value).startswith(str(llama))
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_tokenizer_is_converted_alone_where_its_preprocessor_needs_tensorflow(
    tmp_path: Path,
) -> None:
    files = convert(tiny_huggingface(tmp_path / "source", "gemma3_text", tokenizer=True))
    assert "preprocessor.json" not in files
    assert json.loads(files["task.json"])["config"]["preprocessor"] is None
    preset = unpack(files, tmp_path / "preset")
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(preset))
    assert type(tokenizer) is keras_hub.models.Gemma3Tokenizer
    assert tokenizer.detokenize(tokenizer("the quick brown fox")) == "the quick brown fox"


def test_licenses_and_how_to_prompt_come_along(llama: Path) -> None:
    carried = {
        "LICENSE.txt": b"You may.",
        "NOTICE": b"By many.",
        "USE_POLICY.md": b"Be kind.",
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"temperature": 0.6}',
    }
    for name, content in carried.items():
        (llama / name).write_bytes(content)
    (llama / "README.md").write_text("Of the float model.")
    files = convert(llama)
    assert {name: files[name] for name in carried} == carried
    assert "README.md" not in files
