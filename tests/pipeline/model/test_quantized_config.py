"""The source's JSON with quantized layers in it, and nothing else changed."""

import copy
import json
import shutil

import keras
import keras_hub
import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.model.preset import read_preset
from pipeline.model.preset_json import base_policy, layer_policy, policy_map, quantized_json
from quantizer import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme
from tests.models.tiny import tiny_preset

POLICIES = {
    "transformer_layer_0/self_attention/query": "gptq/3/16",
    "transformer_layer_0/self_attention/value": "awq/4/-1",
    "transformer_layer_0/self_attention/key": "int4/16",
    "token_embedding": "int8",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return tiny_preset("Llama3", folder, num_blocks=1, dtype="bfloat16", tied=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_preset("Bert", tmp_path_factory.mktemp("bert"), num_blocks=1)


def without_dtype(content):
    content = copy.deepcopy(content)
    backbone = content["config"].get("backbone", content)
    return content, backbone["config"].pop("dtype")


def patched(preset, policies=POLICIES, *, leave_out=()):
    files = read_preset(str(preset)).json_files
    return quantized_json({n: c for n, c in files.items() if n not in leave_out}, policies)


def test_only_the_dtype_of_the_backbone_changes(llama):
    files = read_preset(str(llama)).json_files
    made = patched(llama)
    assert sorted(made) == ["config.json", "task.json"]
    for name, content in made.items():
        before, _ = without_dtype(json.loads(files[name]))
        after, dtype = without_dtype(json.loads(content))
        assert json.dumps(after) == json.dumps(before)
        assert dtype["config"]["default_policy"] == "bfloat16"
        assert sorted(dtype["config"]["policy_map"]) == sorted(POLICIES)
    # What KerasHub's own get_config forgets.
    assert json.loads(made["config.json"])["config"]["tie_word_embeddings"] is True


def test_same_input_same_bytes_whatever_the_order_of_layers(llama):
    assert patched(llama, dict(reversed(POLICIES.items()))) == patched(llama)


def test_keras_reads_the_policies_back():
    read = keras.dtype_policies.get(policy_map("float32", POLICIES))
    for path, name in POLICIES.items():
        assert read[path] == keras.dtype_policies.get(f"{name}_from_float32")
    assert read["transformer_layer_0/feedforward_gate_dense"].name == "float32"


@pytest.mark.parametrize(
    ("scheme", "policy"),
    [
        (GPTQScheme(weight_bits=3, group_size=64), "gptq/3/64"),
        (AWQScheme(group_size=-1), "awq/4/-1"),
        (Int4Scheme(block_size=32), "int4/32"),
        (Int4Scheme(block_size=-1), "int4/-1"),
        (Int8Scheme(), "int8"),
        (Float8Scheme(), "float8"),
    ],
)
def test_every_scheme_has_a_policy_that_keras_knows(scheme, policy):
    assert layer_policy(scheme) == policy
    assert keras.dtype_policies.get(f"{policy}_from_float32").quantization_mode == scheme.mode


def test_int8_weights_alone_are_refused_since_stock_would_round_the_inputs_too():
    with pytest.raises(ArtifactError, match="quantize_activations: true, or gptq"):
        layer_policy(Int8Scheme(quantize_activations=False))


def test_a_quantized_source_is_refused(llama):
    made = patched(llama)
    with pytest.raises(ArtifactError, match="already quantized; start from the float model"):
        quantized_json(made, POLICIES)
    with pytest.raises(ArtifactError, match="already quantized"):
        base_policy({"config": {"dtype": "int8_from_float32"}})


def test_a_policy_that_keras_refuses_is_named_with_its_layer():
    with pytest.raises(ArtifactError, match=r"^head: Keras refuses 'gptq/5/16' on 'float32': "):
        policy_map("float32", {"head": "gptq/5/16"})


def load(source, folder, files, task):
    """Build the preset as a user does, with random weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.h5", "task.json"))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return getattr(keras_hub.models, task).from_preset(str(folder), load_weights=False)


def test_without_task_json_a_decoder_becomes_a_causal_language_model(llama, tmp_path):
    files = patched(llama, leave_out=["task.json"])
    task = load(llama, tmp_path / "artifact", files, "CausalLM")
    assert type(task) is keras_hub.models.Llama3CausalLM
    assert type(task.preprocessor) is keras_hub.models.Llama3CausalLMPreprocessor
    layers = {layer.path: layer for layer in task.backbone._flatten_layers()}
    for path, name in POLICIES.items():
        assert layers[path].quantization_mode == name.partition("/")[0]
    assert len(task.preprocessor(["the dog"])[0]["token_ids"][0]) > 2


@pytest.mark.exhaustive
def test_without_task_json_an_encoder_becomes_a_text_embedder(bert, tmp_path):
    policies = {"transformer_layer_0/self_attention_layer/query": "int8"}
    files = patched(bert, policies, leave_out=["task.json"])
    task = load(bert, tmp_path / "artifact", files, "TextEmbedder")
    assert type(task) is keras_hub.models.BertTextEmbedder
    # It has no weights of its own, so nothing in it is left to chance.
    assert not task.has_task_weights()
    vectors = task.predict_on_batch(["the dog", "and the sun"])
    assert vectors.shape == (2, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)
    [layer] = [x for x in task.backbone._flatten_layers() if x.path in policies]
    assert layer.quantization_mode == "int8"


def test_without_tokenizer_the_task_has_no_preprocessor(bert):
    left_out = ["task.json", "preprocessor.json", "tokenizer.json"]
    files = patched(bert, {}, leave_out=left_out)
    assert json.loads(files["task.json"])["config"]["preprocessor"] is None
