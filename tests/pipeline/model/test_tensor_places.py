from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.errors import ExportError
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.model.tensor_places import TensorPlaces, find_places
from pipeline.weights.source import open_source
from tests.models.tiny_huggingface import HIDDEN, tiny_huggingface
from tests.selection import by_default

# Of tensors that KerasHub's backbones have no place for.
UNUSED = ("vocab_", "predictions.", "attn.bias")
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("gpt2", "bert", "distilbert", "albert"),
)
# Heads along another axis, and three layers in one transposed matrix.
DEFAULT = ("llama", "gemma", "gpt2")


def folder_in_float32(path: Path, family: str, **options: Any) -> Path:
    return tiny_huggingface(path, family, dtype="f4", torch_dtype="float32", **options)


def places_of(folder: Path) -> TensorPlaces:
    preset = read_preset(str(folder))
    return find_places(preset, build_skeleton(preset, "float32"))


@pytest.mark.parametrize("family", by_default(FAMILIES, DEFAULT))
def test_values_go_back_to_where_kerashub_reads_them(family: str, tmp_path: Path) -> None:
    folder = folder_in_float32(tmp_path, family)
    source, places = open_source(read_preset(str(folder))), places_of(folder)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for place in places.tensors.values():
        [name] = [full for full in given if full.endswith(place.name)]
        made = np.full(place.shape, np.nan, np.float32)
        for path, value in source.read(place.variables).items():
            places.scatter(path, value, made)
        np.testing.assert_array_equal(made, given.pop(name), err_msg=name)
    assert [name for name in given if not any(part in name for part in UNUSED)] == []


@pytest.mark.parametrize(
    ("family", "tensor", "num_variables", "input_axis"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight", 1, 1),
        ("gemma", "model.layers.0.self_attn.q_proj.weight", 1, 1),
        ("gpt2", "h.0.attn.c_attn.weight", 3, 0),
        ("gpt2", "h.0.mlp.c_proj.weight", 1, 0),
        ("gpt2", "wte.weight", 1, None),
    ],
)
def test_a_matrix_knows_the_axis_of_its_inputs(
    family: str, tensor: str, num_variables: int, input_axis: int | None, tmp_path: Path
) -> None:
    place = places_of(folder_in_float32(tmp_path, family)).tensors[tensor]
    assert (len(place.variables), place.input_axis) == (num_variables, input_axis)


def test_blocks_are_alike_and_unlike_layers_are_not(tmp_path: Path) -> None:
    places = places_of(folder_in_float32(tmp_path, "llama"))

    def signature(block: int, layer: str) -> object:
        return places.signature(f"model.layers.{block}.self_attn.{layer}.weight")

    assert signature(0, "q_proj") == signature(1, "q_proj")
    assert signature(0, "q_proj") != signature(0, "k_proj")


def test_no_weights_are_needed(tmp_path: Path) -> None:
    folder = folder_in_float32(tmp_path, "llama")
    with_weights = places_of(folder).tensors
    (folder / "model.safetensors").unlink()
    assert places_of(folder).tensors == with_weights


@pytest.mark.parametrize("family", by_default(("roberta", "xlm-roberta", "bart"), ["xlm-roberta"]))
def test_zeros_stand_where_kerashub_reads_nothing(family: str, tmp_path: Path) -> None:
    # Of RoBERTa's positions the first two rows are never read, and XLM-R's kinds of text are added
    # to them: another checkpoint than the source, but of the same model.
    none = {"roberta.embeddings.token_type_embeddings.weight": np.zeros((1, HIDDEN), np.float32)}
    source = folder_in_float32(tmp_path / "a", family, extra=none if family == "roberta" else {})
    places = places_of(source)
    before = open_source(read_preset(str(source))).read(tuple(places.conversions))
    made = {name: np.zeros(one.shape, np.float32) for name, one in places.tensors.items()}
    for path, value in before.items():
        places.scatter(path, value, made[places.conversions[path].tensor])
    copy = folder_in_float32(tmp_path / "b", family)
    save_file(made, copy / "model.safetensors")
    with safe_open(source / "model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, value in made.items():
        assert [value.shape] == [shape for full, shape in shapes.items() if full.endswith(name)]
    after = open_source(read_preset(str(copy))).read(tuple(before))
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_what_a_converter_computes_is_refused(tmp_path: Path) -> None:
    """A tensor with the gates of GPT-OSS beside its other projections, in one order or another."""
    folder = folder_in_float32(tmp_path, "mistral")
    config = json.loads((folder / "config.json").read_text())
    gpt_oss = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config | gpt_oss | {"sliding_window": None}))
    with pytest.raises(ExportError, match=r"computes with .*experts.* itself.*cannot be exported"):
        _ = places_of(folder).tensors


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    llama = read_preset(str(folder_in_float32(tmp_path / "llama", "llama")))
    bert = read_preset(str(folder_in_float32(tmp_path / "bert", "bert")))
    with pytest.raises(ExportError, match="is of a BertBackbone, and the result is a Llama3Back"):
        find_places(bert, build_skeleton(llama, "float32"))
