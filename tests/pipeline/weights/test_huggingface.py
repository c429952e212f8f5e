"""What is read from Hugging Face folders of every family, and what is refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import keras_hub
import ml_dtypes
import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.model.huggingface import kerashub_subclass
from pipeline.model.preset import read_preset
from pipeline.weights.source import Source, open_source
from tests.models.stock_load import load_stock
from tests.models.tiny_huggingface import CONFIGS, tiny_huggingface
from tests.selection import by_default

NO_TYPES = {"roberta.embeddings.token_type_embeddings.weight": np.zeros((1, 32), np.float32)}
"""Zeros, as in every published RoBERTa."""


def source_of(path: Path) -> Source:
    return open_source(read_preset(str(path)))


@pytest.mark.parametrize("family", by_default(CONFIGS, []))
def test_every_variable_is_what_stock_kerashub_loads(family: str, tmp_path: Path) -> None:
    extra = NO_TYPES if family == "roberta" else None
    changes = {}
    if family == "gemma3":  # stock KerasHub insists on what is the default
        changes["text_config"] = CONFIGS[family]["text_config"] | {"head_dim": 256}
    folder = tiny_huggingface(tmp_path, family, extra=extra, torch_dtype="float32", **changes)
    source = source_of(folder)
    source.check_complete()
    backbone = load_stock(keras_hub.models.Backbone, folder, dtype="float32")
    expected = {v.path: np.asarray(v.value) for v in backbone.variables}
    found = source.read(source.paths)
    assert set(found) == {path for path in expected if "seed_generator" not in path}
    # Stock KerasHub passes Mistral through float16; see the next test.
    rounding = {"rtol": 1e-3, "atol": 1e-4} if family == "mistral" else {"rtol": 0, "atol": 0}
    for path, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[path], **rounding, err_msg=path)


def test_no_converter_casts(tmp_path: Path) -> None:
    """KerasHub's for Mistral casts to float16, where this value is infinite."""
    name = "model.layers.1.mlp.up_proj.weight"
    value = np.full((64, 32), 1e9, np.float32).astype(ml_dtypes.bfloat16)
    value[0, 1] = 1.0078125  # has 7 bits of mantissa
    source = source_of(tiny_huggingface(tmp_path, "mistral", extra={name: value}))
    path = "transformer_layer_1/feedforward_intermediate_dense/kernel"
    [found] = source.read([next(p for p in source.paths if p.endswith(path))]).values()
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found, value.T)


def test_tensors_of_a_dtype_of_their_own_are_cast_as_keras_casts(tmp_path: Path) -> None:
    norm = np.linspace(0.9, 1.1, 32, dtype=np.float32)
    extra = {f"model.layers.{i}.input_layernorm.weight": norm for i in range(2)}
    source = source_of(tiny_huggingface(tmp_path, "llama", extra=extra))
    assert source.casts() == {"float32 to bfloat16": 2}
    [path, _] = [p for p in source.paths if "self_attention_layernorm" in p]
    [found] = source.read([path]).values()
    assert np.array_equal(found, norm.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "model.layers.0.self_attn.q_proj.bias",
            np.ones(32, np.float32),
            r"has no place for model\.layers\.0\.self_attn\.q_proj\.bias \[32\]",
        ),
        ("lm_head.bias", np.ones(320, np.float32), r"has no place for lm_head\.bias \[320\]"),
        ("score.weight", np.ones((2, 32), np.float32), r"has no place for score\.weight \[2, 32\]"),
        ("model.layers.2.mlp.up_proj.weight", np.ones((64, 32), np.float32), "has no place for"),
        ("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32), None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32), None),
    ],
)
def test_a_tensor_that_nobody_reads_is_refused_unless_it_is_harmless(
    name: str, value: np.ndarray, expected: str | None, tmp_path: Path
) -> None:
    source = source_of(tiny_huggingface(tmp_path, "llama", extra={name: value}))
    source.variables()
    refused = contextlib.nullcontext()
    if expected is not None:
        refused = pytest.raises(SourceError, match=expected)  # type: ignore[assignment]
    with refused:
        source.check_complete()


def test_a_classifier_is_refused_with_what_to_do(tmp_path: Path) -> None:
    head = {
        f"classifier.{n}": np.ones(s, np.float32) for n, s in (("weight", (2, 32)), ("bias", 2))
    }
    with pytest.raises(SourceError, match=r"classifier\.bias \[2\].* preset with its head"):
        source_of(tiny_huggingface(tmp_path, "bert", extra=head)).check_complete()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_tied_model_is_a_copy(tied: bool, tmp_path: Path) -> None:
    head = {"lm_head.weight": np.ones((320, 32), np.float32)}
    folder = tiny_huggingface(tmp_path, "gemma", extra=head, tie_word_embeddings=tied)
    if tied:
        source_of(folder).check_complete()
    else:
        with pytest.raises(SourceError, match=r"has no place for lm_head\.weight"):
            source_of(folder).check_complete()


@pytest.mark.parametrize(
    ("family", "name", "is_a_copy"),
    [
        ("bart", "model.decoder.embed_tokens.weight", True),
        ("gemma3", "vision_tower.vision_model.head.probe", False),
    ],
)
def test_what_is_stored_beside_two_chains_or_an_encoder_is_known(
    family: str, name: str, is_a_copy: bool, tmp_path: Path
) -> None:
    """BART's chains share one table; SigLIP pools images for a task of its own."""
    extra = {name: np.ones((320, 32), np.float32)}
    source = source_of(tiny_huggingface(tmp_path, family, extra=extra))
    with contextlib.nullcontext() if is_a_copy else pytest.raises(SourceError, match=name):
        source.check_complete()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_values_that_are_not_finite_are_counted_and_named(dtype: str, tmp_path: Path) -> None:
    table = np.ones((320, 32), dtype)
    table[3, :5] = np.nan
    table[4, 7] = -np.inf
    extra = {"model.embed_tokens.weight": table}
    source = source_of(tiny_huggingface(tmp_path, "llama", extra=extra, torch_dtype=dtype))
    source.read([path for path in source.paths if "layernorm" in path])
    with pytest.raises(
        SourceError,
        match=r"model\.safetensors: model\.embed_tokens\.weight: 6 of 10240 values are NaN or inf",
    ):
        source.read(source.paths)


def test_values_too_large_for_the_dtype_are_named(tmp_path: Path) -> None:
    big = {"model.norm.weight": np.full(32, 1e6, np.float32)}
    source = source_of(tiny_huggingface(tmp_path, "llama", extra=big, torch_dtype="float16"))
    with pytest.raises(SourceError, match=r"model\.norm\.weight: 32 of 32 .* too large for float1"):
        source.read(source.paths)


def test_a_dtype_that_is_none_of_a_float_model_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    eight_bits = {name: np.ones((64, 32), np.float32).astype(ml_dtypes.float8_e4m3fn)}
    source = source_of(tiny_huggingface(tmp_path, "llama", extra=eight_bits))
    with pytest.raises(SourceError, match=rf"{name} is stored as F8_E4M3, .* already quantized"):
        source.variables()


def test_heads_of_another_width_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """As KerasHub's hooks reshape them; config.json does not tell here."""
    name = "model.layers.0.self_attn.q_proj.weight"
    source = source_of(
        tiny_huggingface(tmp_path, "llama", extra={name: np.ones((64, 32), np.float32)})
    )
    expected = rf"{name} for .*: shape \(64, 32\) does not convert to \(32, 4, 8\)"
    with pytest.raises(SourceError, match=expected) as refused:
        source.variables()
    assert "\n" not in str(refused.value)


def test_large_tensors_with_which_a_converter_computes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for a mixture of experts; small ones are kept, as for XLM-RoBERTa above."""
    monkeypatch.setattr("pipeline.weights.safetensors._MAX_COMPUTED_BYTES", 1 << 10)
    source = source_of(tiny_huggingface(tmp_path, "xlm-roberta"))
    with pytest.raises(SourceError, match=r"computes with tensor .* save_to_preset"):
        source.variables()


def test_weights_for_pytorch_alone_say_how_to_convert_them(tmp_path: Path) -> None:
    tiny_huggingface(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        SourceError, match=r"in pytorch_model\.bin, .*LlamaForCausalLM\.from_pretrained"
    ):
        source_of(tmp_path).variables()


def test_the_class_of_several_does_not_depend_on_the_order_of_a_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone: Any = keras_hub.models.MistralBackbone
    plain = keras_hub.models.MistralTokenizer
    other = type("MistralTekkenTokenizer", (), {"backbone_cls": backbone})
    for order in ([plain, other], [other, plain]):
        monkeypatch.setattr("pipeline.model.huggingface.list_subclasses", lambda _, o=order: o)
        assert kerashub_subclass(keras_hub.models.Tokenizer, backbone) is plain
