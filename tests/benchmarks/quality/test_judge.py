"""The judge's figures are those of whole logits in NumPy, for float and for quantized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from tests.benchmarks.quality.judge import Judge
from tests.benchmarks.quality.weights import effective_weights, put_weights, variable_shapes

WINDOWS = {
    kind: np.random.default_rng(seed).integers(0, 96, (3, 10)).astype(np.int32)
    for seed, kind in enumerate(("novels", "code"))
}


def tiny_task(*, seed: int = 0, dtype: Any = "float32") -> Any:
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=96,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=48,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return keras_hub.models.Llama3CausalLM(backbone=backbone)


pytestmark = pytest.mark.exhaustive


def logits(task: Any, tokens_WT: np.ndarray) -> np.ndarray:
    inputs = {"token_ids": tokens_WT, "padding_mask": np.ones_like(tokens_WT)}
    return np.asarray(task(inputs), np.float64)[:, :-1]


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def source() -> Any:
    return tiny_task()


def loaded(quantized: Any, layers: tuple[str, ...]) -> Any:
    """As a task comes out of an artifact: the dtype of each of its layers is of a map."""
    int8 = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    policies = dict.fromkeys(layers, int8)
    dtype = keras.dtype_policies.DTypePolicyMap(
        default_policy=keras.DTypePolicy("float32"), policy_map=policies
    )
    task = tiny_task(dtype=dtype)
    for variable, other in zip(task.weights, quantized.weights, strict=True):
        variable.assign(other)
    return task


@pytest.mark.parametrize("made", ["float", "int8", "int8 and loaded"])
def test_figures_are_those_of_whole_logits(source: Any, tmp_path: Path, made: str) -> None:
    other = tiny_task(seed=1)
    if made != "float":  # inputs are quantized at run time, those of the output head too
        other.backbone.token_embedding.quantize("int8")
        other.backbone.transformer_layers[0]._feedforward_gate_dense.quantize("int8")
    if made == "int8 and loaded":
        other = loaded(other, ("token_embedding", "transformer_layer_0/feedforward_gate_dense"))
    found = Judge(source, "tiny", WINDOWS, tmp_path).judge(other)
    for kind, tokens_WT in WINDOWS.items():
        theirs, ours = (log_softmax(logits(task, tokens_WT)) for task in (source, other))
        chosen = np.take_along_axis(ours, tokens_WT[:, 1:, None], axis=-1)[..., 0]
        kl_WT = (np.exp(theirs) * (theirs - ours)).sum(-1)
        flips_W = (theirs.argmax(-1) != ours.argmax(-1)).mean(1)
        known = np.take_along_axis(theirs, tokens_WT[:, 1:, None], axis=-1)[..., 0]
        expected = {
            "float_nll": -known.mean(1),
            "nll": -chosen.mean(1),
            "kl": kl_WT.mean(1),
            "kl_p99": np.quantile(kl_WT, 0.99, axis=1),
            "flips": flips_W,
        }
        for metric, values in expected.items():
            np.testing.assert_allclose(found[kind][metric], values, rtol=2e-4, atol=1e-5)


def test_the_float_model_is_kept_and_differs_from_itself_in_nothing(
    source: Any, tmp_path: Path
) -> None:
    first = Judge(source, "tiny", WINDOWS, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    second = Judge(source, "tiny", WINDOWS, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files
    quick = Judge(source, "tiny", WINDOWS, tmp_path, num_windows=2).judge(source)
    assert {len(values["kl"]) for values in quick.values()} == {2}
    assert second.digest == first.digest != Judge(source, "else", WINDOWS, tmp_path).digest
    for values in second.judge(source).values():
        assert max(map(abs, values["kl"])) < 1e-6
        assert max(values["flips"]) == 0


def test_a_float_model_with_a_stock_models_weights_answers_as_it_does(source: Any) -> None:
    quantized, other = tiny_task(), tiny_task(seed=1)
    other.backbone.token_embedding.embeddings.assign(source.backbone.token_embedding.embeddings)
    other.backbone.layer_norm.scale.assign(source.backbone.layer_norm.scale)
    for block in quantized.backbone.transformer_layers:
        for layer in block._flatten_layers():
            if isinstance(layer, keras.layers.EinsumDense | keras.layers.Dense):
                layer.quantize("int4")
    weights = effective_weights(quantized, variable_shapes(source))
    assert weights is not None
    put_weights(other, weights)
    tokens_WT = WINDOWS["novels"]
    expected = logits(quantized, tokens_WT)
    assert np.abs(expected - logits(source, tokens_WT)).max() > 0.01
    np.testing.assert_allclose(logits(other, tokens_WT), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        put_weights(other, {k: v for k, v in weights.items() if "0.mlp.up" not in k})


def test_a_layer_that_quantizes_its_inputs_has_no_effective_weight(source: Any) -> None:
    quantized = tiny_task()
    quantized.backbone.transformer_layers[1]._feedforward_gate_dense.quantize("int8")
    assert effective_weights(quantized, variable_shapes(source)) is None
