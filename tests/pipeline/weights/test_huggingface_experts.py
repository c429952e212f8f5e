"""Experts of Hugging Face folders: what is read, how much of it at once, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import SourceError
from pipeline.model.preset import PresetFiles, read_preset
from pipeline.model.recorded_tensors import carried_out
from pipeline.weights.source import Source, open_source
from tests.models.stock_load import load_stock
from tests.models.tiny_huggingface import write_json
from tests.models.transformers_answers import folder_of
from tests.selection import by_default

FAMILIES = (
    "gemma4 with experts",
    "gpt_oss in four bits",
    "mixtral, as saved",
    "qwen2_moe, as saved",
    "qwen3_5_moe, as saved",
    "qwen3_moe, as saved",
)
# The values that four bits of MXFP4 stand for (Open Compute Project, MX 1.0, table 4).
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def source_of(folder: Path) -> Source:
    return open_source(read_preset(str(folder)))


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", by_default(FAMILIES, ["mixtral, as saved"]))
def test_every_variable_is_what_stock_kerashub_loads(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.weights.safetensors._MAX_COMPUTED_BYTES", 0)
    folder = folder_of(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if "num_local_experts" in config:  # stock KerasHub knows one name for each family
        write_json(folder / "config.json", config | {"num_experts": config["num_local_experts"]})
    source = source_of(folder)
    source.check_complete()
    keras.utils.clear_session()  # numbers the names of blocks anew
    backbone = load_stock(keras_hub.models.Backbone, folder, dtype="float32")
    expected = {v.path: np.asarray(v.value) for v in backbone.variables}
    found = source.read(source.paths)
    assert set(found) == {path for path in expected if "seed_generator" not in path}
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize(
    "name", by_default(["gpt_oss in four bits", "mixtral, as saved"], ["mixtral, as saved"])
)
def test_planning_reads_headers_alone(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    stops, plain = [], PresetFiles.read

    def read(preset: PresetFiles, file: str, start: int = 0, stop: int | None = None) -> bytes:
        if file.endswith(".safetensors"):
            stops.append(stop)
        return plain(preset, file, start, stop)

    monkeypatch.setattr(PresetFiles, "read", read)
    source = source_of(folder)
    source.prepare()
    found = source.variables()
    length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert max(stops) == 8 + length
    assert all(variable.dtype == "float32" for variable in found.values())
    assert source.casts() == {}


def mixtral(path: Path, *, blocks: int, experts: int = 4, hidden: int = 64) -> Path:
    """Of experts that are most of it."""
    folder = folder_of("mixtral, as saved", path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": blocks, "num_local_experts": experts, "vocab_size": 8}
    config |= {"hidden_size": hidden, "intermediate_size": 4 * hidden, "torch_dtype": "bfloat16"}
    shapes = {"embed_tokens.weight": (8, hidden), "norm.weight": (hidden,)}
    for block in range(blocks):
        layer = f"layers.{block}"
        shapes |= {f"{layer}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (hidden // 2, hidden) for n in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            one = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{one}.{name}.weight": (4 * hidden, hidden) for name in ("w1", "w3")}
            shapes[f"{one}.w2.weight"] = (hidden, 4 * hidden)
    tensors = {f"model.{n}": np.ones(s, ml_dtypes.bfloat16) for n, s in shapes.items()}
    tensors["lm_head.weight"] = np.ones((8, hidden), ml_dtypes.bfloat16)
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_bank_is_held_at_a_time_whatever_the_number_of_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.weights.weight_files._SLAB_VALUES", 1 << 14)
    most = {}
    for blocks in (2, 4):
        source = source_of(mixtral(tmp_path / str(blocks), blocks=blocks, hidden=128))
        source.prepare()
        source.variables()
        tracemalloc.start()
        for path in source.paths:
            source.read([path])
        most[blocks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    bank = 4 * 128 * 512 * 2
    # One expert's tensor beside it, as it is read.
    assert bank < most[2] < 1.8 * bank
    assert most[4] < 1.1 * most[2]


def four_bits(folder: Path, block: int, name: str) -> np.ndarray[Any, Any]:
    """An expert tensor's values by the table, [experts, inputs, outputs]."""
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{block}.mlp.experts.{name}"
    blocks, scales = tensors[f"{prefix}_blocks"], tensors[f"{prefix}_scales"]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:3], 32)
    values = FP4[codes & 7] * np.where(codes & 8, -1, 1)
    exact = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return exact.reshape(*blocks.shape[:2], -1).swapaxes(1, 2).astype(np.float32)


def test_four_bits_are_decoded_exactly_and_one_expert_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = folder_of("gpt_oss in four bits", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    source = source_of(folder)
    path = next(p for p in source.paths if "layer_1" in p and p.endswith("gate_up_proj"))
    assert source.variables()[path].dtype == "bfloat16"
    sizes, plain = [], PresetFiles.read

    def read(preset: PresetFiles, file: str, start: int = 0, stop: int = 0) -> bytes:
        sizes.append(stop - start)
        return plain(preset, file, start, stop)

    monkeypatch.setattr(PresetFiles, "read", read)
    [found] = source.read([path]).values()
    assert found.dtype == ml_dtypes.bfloat16
    expected = four_bits(folder, 1, "gate_up_proj")
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    experts, inputs, outputs = expected.shape
    assert sizes == [inputs * outputs // 2, inputs * outputs // 32] * experts


@pytest.mark.parametrize("agrees", [True, False])
def test_four_bits_are_looked_up_if_the_converter_agrees_on_the_first_expert(
    agrees: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    computed = []

    def counted(*args: Any) -> Any:
        computed.append(args)
        return carried_out(*args)

    monkeypatch.setattr("pipeline.weights.safetensors.carried_out", counted)
    if not agrees:
        monkeypatch.setattr("pipeline.weights.mxfp4._PAIRS", np.zeros((256, 2), np.float32))
    folder = folder_of("gpt_oss in four bits", tmp_path)
    source = source_of(folder)
    path = next(p for p in source.paths if "layer_1" in p and p.endswith("down_proj"))
    [found] = source.read([path]).values()
    np.testing.assert_array_equal(found, four_bits(folder, 1, "down_proj"))
    assert len(computed) == (1 if agrees else len(found))
    assert len(found) > 1


@pytest.mark.exhaustive
def test_a_gpt_oss_that_transformers_decoded_is_read_as_it_is(tmp_path: Path) -> None:
    coded = folder_of("gpt_oss in four bits", tmp_path / "coded")
    floats = folder_of("gpt_oss, as saved", tmp_path / "floats")

    def decode(tensors: dict[str, Any]) -> None:
        for block in range(2):
            for name in ("gate_up_proj", "down_proj"):
                full = f"model.layers.{block}.mlp.experts.{name}"
                tensors[full] = np.ascontiguousarray(four_bits(coded, block, name))

    one, other = source_of(coded), source_of(changed(floats, decode))
    for path, value in one.read(one.paths).items():
        np.testing.assert_array_equal(value, other.read([path])[path], err_msg=path)


def checked(source: Source) -> None:
    source.variables()
    source.check_complete()


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(EXPERT), rf"tensor {EXPERT} is missing"),
        (
            lambda t: t.update({EXPERT: t[EXPERT][:-1].copy()}),
            rf"{EXPERT} gives \(32, 63\), where \(32, 64\) is expected",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].astype("f2")}),
            r"joined for .*: stored as float16 and float32; save the model in one dtype",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].astype("i1")}),
            rf"{EXPERT} is stored as I8, .* already quantized",
        ),
        (
            lambda t: t.update({EXPERT.replace("experts.2", "experts.4"): t[EXPERT]}),
            r"has no place for model\.layers\.1\..*experts\.4\.w1\.weight",
        ),
    ],
)
def test_what_is_wrong_with_one_expert_is_named(
    change: Callable[[dict[str, Any]], None], expected: str, tmp_path: Path
) -> None:
    source = source_of(changed(folder_of("mixtral, as saved", tmp_path), change))
    with pytest.raises(SourceError, match=expected) as refused:
        checked(source)
    assert "\n" not in str(refused.value)


def test_values_of_an_expert_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[EXPERT][3, :2] = np.nan

    source = source_of(changed(folder_of("mixtral, as saved", tmp_path), spoil))
    with pytest.raises(SourceError, match=r"layers\.1\..*\.w1\.weight.*: 2 of 8192 values are NaN"):
        source.read(source.paths)
