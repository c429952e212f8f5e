from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.artifact.bit_packing import unpack_bits
from pipeline.errors import ExportError, SourceError
from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.description import ExportDescription
from pipeline.model.checkpoint_config import CheckpointConfig
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore
from tests.models.tiny_huggingface import CONFIGS, tiny_huggingface
from tests.pipeline.export.runs import checkpoint_of, finished_run, unsolved
from tests.pipeline.presets import shared_preset

INT4 = {"mode": "int4", "block_size": 16}
GPTQ = {"mode": "gptq", "weight_bits": 4, "group_size": 32}


def small(architecture: str) -> Path:
    # A Hugging Face GPT-2 that KerasHub reads is four times as wide inside.
    options = {"intermediate_dim": 256} if architecture == "GPT2" else {}
    return shared_preset(architecture, **options)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface")
    tiny_huggingface(folder, "llama", dtype="f4", torch_dtype="float32")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("of the source")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def run(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    url = str(tmp_path_factory.mktemp("run"))
    store, _ = finished_run(huggingface, url, INT4, embeddings={"mode": "int8"})
    return store


def checkpoint(run: ObjectStore, *arguments: Any, **options: Any) -> Checkpoint:
    artifact = read_preset(f"{run.root_url}/artifact")
    return plan_checkpoint(read_plan(run), artifact, *arguments, **options)


def tensors(found: Checkpoint, run: ObjectStore) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for part in found.parts:
        made |= found.encode(part.number, committed_file(run, part.number))
    return made


def test_packed_codes_are_the_weights_of_the_dense_checkpoint(run: ObjectStore) -> None:
    packed = checkpoint(run, "compressed-tensors")
    stored, dense = tensors(packed, run), tensors(checkpoint(run, "dense"), run)
    assert len(packed.formats) == 14
    for module in packed.formats:
        weight = dense.pop(f"{module}.weight")
        codes = unpack_bits(stored[f"{module}.weight_packed"], 4, weight.shape[1])
        zero_GR = np.ascontiguousarray(stored[f"{module}.weight_zero_point"].T)
        zero = unpack_bits(zero_GR, 4, weight.shape[0]).T
        scale = stored[f"{module}.weight_scale"]
        group = np.arange(weight.shape[1]) // 16
        values = (codes - zero[:, group].astype(np.float32)) * scale[:, group]
        np.testing.assert_allclose(values, weight, rtol=1e-6, atol=1e-9)
    # Everything else is the same, the quantized embeddings too.
    for name, value in dense.items():
        np.testing.assert_array_equal(stored[name], value)
    assert "model.embed_tokens.weight" in dense


def test_names_and_shapes_are_those_of_the_source(run: ObjectStore, huggingface: Path) -> None:
    from safetensors import safe_open

    made = tensors(checkpoint(run, "dense"), run)
    with safe_open(huggingface / "model.safetensors", "numpy") as file:
        source = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: value.shape for name, value in made.items()} == {
        name: value.shape for name, value in source.items()
    }
    norm = "model.layers.1.input_layernorm.weight"
    np.testing.assert_array_equal(made[norm], source[norm])


def test_config_is_the_source_s_own_with_dtype_and_schemes(
    run: ObjectStore, huggingface: Path
) -> None:
    config = checkpoint(run, "compressed-tensors", dtype="bfloat16").config_json()
    source = json.loads((huggingface / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config.pop("dtype") == config["torch_dtype"] == "bfloat16"
    assert config == {**source, "torch_dtype": "bfloat16"}
    assert quantization["ignore"] == ["lm_head"]
    assert "quantization_config" not in checkpoint(run, "dense").config_json()


def test_float_tensors_and_scales_take_the_dtype_asked_for(run: ObjectStore) -> None:
    made = tensors(checkpoint(run, "compressed-tensors", dtype="bfloat16"), run)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in made.items()}
    assert kinds["weight_scale"] == kinds["weight"] == ml_dtypes.bfloat16
    assert kinds["weight_packed"] == np.int32


def test_tokenizer_and_licence_go_along_and_the_source_s_card_does_not(run: ObjectStore) -> None:
    files = checkpoint(run, "dense").config.small_files()
    assert set(files) == {"special_tokens_map.json", "LICENSE", "generation_config.json"}


def test_pooling_goes_along_with_an_encoder(tmp_path: Path) -> None:
    wanted = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    wanted |= {"1_Pooling/config.json"}
    for name in (*wanted, "config.json", "2_Other/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "bert"}')
    folder = read_preset(str(tmp_path))
    assert set(CheckpointConfig(folder=folder, made=False).small_files()) == wanted


def test_a_report_says_what_serves_each_matrix(run: ObjectStore) -> None:
    rows = {row.module: row for row in checkpoint(run, "compressed-tensors").report()}
    row = rows["model.layers.0.mlp.down_proj"]
    assert row.layers == ("transformer_layer_0/feedforward_output_dense",)
    assert (row.scheme, row.stored) == ("int4/16", "4 bits, asymmetric, groups of 16")
    assert (row.kernel, row.reason.startswith("groups of 16")) == ("", True)
    table = rows["model.embed_tokens"]
    assert (table.scheme, table.stored, table.kernel) == ("int8", "float32", "dense")
    assert table.reason.startswith("dequantized")


def test_a_preset_needs_no_hugging_face_folder_where_kerashub_writes_the_config() -> None:
    found = checkpoint_of(small("Llama3"), INT4)
    assert found.config.made
    assert found.config_json()["architectures"] == ["LlamaForCausalLM"]
    assert set(found.config.small_files()) == {"tokenizer.json", "tokenizer_config.json"}
    assert found.config_json()["bos_token_id"] == 0
    assert "has no chat template" in notes_of(found)


def notes_of(found: Checkpoint) -> str:
    return "\n".join(ExportDescription.of(found).notes)


def test_what_not_every_runtime_reads_is_noted(run: ObjectStore) -> None:
    assert "transformers 5.23 and 5.24 refuse" in notes_of(checkpoint(run, "compressed-tensors"))
    assert "5.23" not in notes_of(checkpoint(run, "dense"))
    symmetric = checkpoint_of(small("Llama3"), GPTQ | {"symmetric": True})
    assert "5.23" not in notes_of(symmetric)


def test_an_encoder_is_exported_without_its_head(tmp_path: Path) -> None:
    preset = small("Bert")
    config = json.loads((preset / "config.json").read_text())["config"]
    tiny_huggingface(
        tmp_path,
        "bert",
        architectures=["BertForMaskedLM"],
        vocab_size=config["vocabulary_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        hidden_size=config["hidden_dim"],
        intermediate_size=config["intermediate_dim"],
        max_position_embeddings=config["max_sequence_length"],
        type_vocab_size=config["num_segments"],
    )
    found = checkpoint_of(preset, INT4, like_url=str(tmp_path))
    assert found.config_json()["architectures"] == ["BertModel"]
    assert "BertModel is exported, without the head" in notes_of(found)


def test_fused_layers_go_into_one_matrix() -> None:
    found = checkpoint_of(small("GPT2"), GPTQ, "gptq")
    [row] = [row for row in found.report() if row.module == "transformer.h.0.attn.c_attn"]
    assert [layer.rpartition("/")[2] for layer in row.layers] == ["query", "key", "value"]
    assert found.formats[row.module].group_size == 32


@pytest.mark.parametrize(
    ("architecture", "scheme", "as_format", "message"),
    [
        ("Llama3", {"mode": "awq", "group_size": 32}, "compressed-tensors", "query: awq .* dense"),
        (
            "Llama3",
            GPTQ | {"group_size": 48},
            "compressed-tensors",
            "query: 64 inputs are not divisible into groups of 48.*group_size that divides 64",
        ),
        ("GPT2", INT4, "compressed-tensors", "h.0.attn.c_attn.weight in a Conv1D.*--format gptq"),
        ("Llama3", {"mode": "int8"}, "gptq", "holds no 8 bits, int8 inputs.*compressed-tensors"),
        ("Gemma", INT4, "compressed-tensors", "do not lie side by side in model.layers.0"),
        ("Bloom", INT4, "dense", "writes no config.json for a BloomBackbone.*with --like"),
    ],
)
def test_what_has_no_place_in_a_format_is_refused_with_its_remedy(
    architecture: str, scheme: dict[str, Any], as_format: Any, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        checkpoint_of(small(architecture), scheme, as_format)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"pattern": "query", "scheme": None}],
            "query: not quantized, but h.0.attn.c_attn.weight",
        ),
        (
            [{"pattern": "query", "scheme": GPTQ | {"weight_bits": 8}}],
            "h.0.attn.c_attn.weight holds .*schemes differ.* give them one scheme",
        ),
    ],
)
def test_layers_fused_by_the_checkpoint_need_one_scheme(
    rules: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        checkpoint_of(small("GPT2"), GPTQ, "gptq", rules=rules)


@pytest.mark.parametrize("listed", [True, False])
def test_names_are_complete_where_kerashub_leaves_out_the_base_model(
    listed: bool, tmp_path: Path
) -> None:
    preset = small("Qwen3")
    config = json.loads((preset / "config.json").read_text())["config"]
    tiny_huggingface(
        tmp_path,
        "qwen3",
        vocab_size=config["vocabulary_size"],
        num_hidden_layers=config["num_layers"],
        hidden_size=config["hidden_dim"],
        intermediate_size=config["intermediate_dim"],
        head_dim=config["head_dim"],
        rope_theta=config["rope_max_wavelength"],
        rms_norm_eps=config["layer_norm_epsilon"],
        tie_word_embeddings=config["tie_word_embeddings"],
        sliding_window=config["sliding_window_size"],
        use_sliding_window=True,
    )
    if not listed:
        (tmp_path / "model.safetensors").unlink()
    names = checkpoint_of(preset, INT4, like_url=str(tmp_path)).names
    assert names["norm.weight"] == "model.norm.weight"
    assert names["layers.0.self_attn.q_norm.weight"] == "model.layers.0.self_attn.q_norm.weight"


def test_a_config_that_says_something_else_is_refused(tmp_path: Path) -> None:
    plan, artifact = unsolved(small("Llama3"), INT4)
    found = plan_checkpoint(plan, artifact, "dense").config_json()
    (tmp_path / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ExportError, match=r"layer_norm_epsilon 0\.001 .* the result has 1e-0"):
        plan_checkpoint(plan, artifact, "dense", like_url=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert not plan_checkpoint(plan, artifact, "dense", like_url=str(tmp_path)).config.made


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    plan, artifact = unsolved(small("Llama3"), INT4)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["bert"] | {"vocab_size": 9}))
    with pytest.raises(ExportError, match="is of a BertBackbone, and the result is a Llama3Backb"):
        plan_checkpoint(plan, artifact, "dense", like_url=str(tmp_path))
    with pytest.raises(ExportError, match="a KerasHub preset; --like takes a Hugging Face folder"):
        plan_checkpoint(plan, artifact, "dense", like_url=str(small("Llama3")))
    with pytest.raises(SourceError, match=r"no config\.json"):
        plan_checkpoint(plan, artifact, "dense", like_url=str(tmp_path / "nowhere"))


def test_a_source_that_is_gone_is_named_by_like(run: ObjectStore, huggingface: Path) -> None:
    plan = dataclasses.replace(read_plan(run), source_url="/nowhere")
    artifact = read_preset(f"{run.root_url}/artifact")
    made = plan_checkpoint(plan, artifact, "dense", like_url=str(huggingface))
    assert made.config.folder.url == str(huggingface)
