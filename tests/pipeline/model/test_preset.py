"""A source's folder: what it is told to be, and what of it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.model.preset import check_preset, decides_model, read_preset
from pipeline.storage.object_store import open_store
from tests.models.tiny_huggingface import write_json
from tests.pipeline.presets import shared_preset


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "the folder is empty or missing"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter; merge it"),
        (["model_index.json", "unet/config.json"], "a pipeline of models for images"),
        (["model-Q4_K_M.gguf"], "a GGUF file, already quantized"),
        (["model.keras"], "a Keras model in one file"),
        (["variables/x.index", "saved_model.pb"], "a TensorFlow SavedModel"),
        (["snapshots/0a1b/config.json", "refs/main"], "but in its folder snapshots/0a1b"),
        (["b.txt", "a.txt"], "only a.txt, b.txt"),
    ],
)
def test_a_folder_without_a_model_is_told_what_it_holds(
    names: list[str], expected: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=expected):
        check_preset(open_store(str(tmp_path)))


def test_a_config_of_neither_kind_is_told_its_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DModel", "sample_size": 32})
    with pytest.raises(SourceError, match="it has _class_name, sample_size; name a model's own"):
        read_preset(str(tmp_path))


def test_another_dtype_replaces_that_of_either_format(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama", "dtype": "float16"})
    config = read_preset(str(tmp_path)).in_dtype("bfloat16").parse("config.json")
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}

    preset = read_preset(str(shared_preset("Llama3")))
    changed = preset.in_dtype("bfloat16")
    before, after = (p.parse("config.json") for p in (preset, changed))
    assert after["config"].pop("dtype")["config"] == {"name": "bfloat16"}
    del before["config"]["dtype"]
    assert after == before
    # What is stored is remembered, since it identifies the source.
    assert json.loads(changed.stored_json["config.json"]) == preset.parse("config.json")
    assert preset.in_dtype(None) is preset


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("chat_template.jinja", True),
        ("generation_config.json", True),
        *((name, False) for name in ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")),
        *((name, False) for name in ("README.md", "pytorch_model.bin")),
    ],
)
def test_a_license_is_no_part_of_what_a_model_computes(name: str, decides: bool) -> None:
    assert decides_model(name) is decides
