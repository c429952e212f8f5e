"""Foldable awq leaves in the checkpoint as plain codes, and the model answers as before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras_hub
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.artifact.parts import decode_part
from pipeline.artifact.safetensors_file import safetensors_bytes
from pipeline.errors import ExportError
from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.code_formats import CodeFormat
from pipeline.export.codes import KernelCodes
from pipeline.export.folding import Divisor, divisors, folds_of
from pipeline.export.writing import write_checkpoint
from pipeline.fold import FoldedVariable
from pipeline.model.huggingface import Conversion
from pipeline.model.preset import read_preset
from pipeline.plan import Plan, read_plan
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore, open_store
from quantizer.schemes import AWQScheme
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset

AWQ = {"mode": "awq", "group_size": 8, "clip_search": False, "foldable": True}
TOKENS = np.random.default_rng(0).integers(5, 60, (2, 24)).astype(np.int32)
Tensors = dict[str, NDArray[Any]]

pytestmark = [
    # KerasHub 0.32 leaves the files of SentencePiece vocabularies open.
    pytest.mark.filterwarnings(r"ignore:unclosed file .*tokenizer\.model:ResourceWarning"),
]


class Exported:
    """A run of a tiny model, and the exports of it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.run: ObjectStore
        self.run, self.manifest = finished_run(source, str(folder / "run"), AWQ)
        self.artifact = folder / "run" / "artifact"
        self.plan: Plan = read_plan(self.run)
        self.folder = folder

    def checkpoint(self, as_format: Any = "compressed-tensors", **options: Any) -> Checkpoint:
        return plan_checkpoint(self.plan, read_preset(str(self.artifact)), as_format, **options)

    def tensors(self, as_format: Any = "compressed-tensors", **options: Any) -> Tensors:
        checkpoint, found = self.checkpoint(as_format, **options), {}
        for number in range(len(checkpoint.parts)):
            found |= checkpoint.encode(number, committed_file(self.run, number))
        return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    source = shared_preset("Llama3", num_blocks=1, hidden_dim=32, intermediate_dim=64)
    return Exported(tmp_path_factory.mktemp("llama"), source)


def unpacked(tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """The weights that a runtime computes with: packed ones decoded, by nobody's code but ours."""
    found = dict(tensors)
    for name in [one for one in tensors if one.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        rows, columns = found.pop(f"{module}.weight_shape")
        codes = nibbles(found.pop(name))[:, :columns].astype(np.float64)
        scale = found.pop(f"{module}.weight_scale").astype(np.float64)
        zero = nibbles(found.pop(f"{module}.weight_zero_point").T).T[:rows]
        group = np.arange(columns) // (columns // scale.shape[1])
        value = (codes - zero[:, group]) * scale[:, group]
        found[f"{module}.weight"] = value.astype(np.float32)
    return found


def nibbles(words: NDArray[np.int32]) -> NDArray[np.int32]:
    """Eight codes of each word, the first in its lowest bits."""
    codes = (words[..., None] >> (4 * np.arange(8))) & 15
    return codes.reshape(*words.shape[:-1], -1)


def answer(backbone: Any) -> NDArray[np.float32]:
    """Hidden states of stock KerasHub."""
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    return np.asarray(backbone.predict_on_batch(inputs), np.float32)


def check_answers(made: Exported, num_norms: int) -> None:
    """Plain codes and folded norms, decoded, are the model that the artifact is."""
    tensors = made.tensors()
    assert not any("awq" in name for name in tensors)
    weights, dense = unpacked(tensors), made.tensors("dense")
    assert weights.keys() == dense.keys()
    changed = [name for name in dense if not np.allclose(weights[name], dense[name], rtol=1e-2)]
    assert sum("norm" in name for name in changed) == num_norms
    folder = made.folder / "plain"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights))
    config = {**made.checkpoint("dense").config_json(), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    task = keras_hub.models.CausalLM.from_preset(str(made.artifact), preprocessor=None)
    expected = answer(task.backbone)
    found = answer(type(task.backbone).from_preset(str(folder)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_plain_codes_and_folded_norms_are_the_same_model(llama: Exported) -> None:
    check_answers(llama, num_norms=2)


@pytest.mark.exhaustive
def test_so_are_norms_that_multiply_by_one_more_than_their_weight(tmp_path: Path) -> None:
    source = tiny_huggingface(
        tmp_path / "source", "gemma", tokenizer=True, dtype="f4", torch_dtype="float32"
    )
    check_answers(Exported(tmp_path, source), num_norms=4)


def test_codes_stay_and_scales_of_layers_before_are_divided(llama: Exported) -> None:
    tensors, checkpoint = llama.tensors(), llama.checkpoint()
    values = decode_part(checkpoint.parts[1], committed_file(llama.run, 1))
    by_layer: dict[str, Tensors] = {}
    for stored in checkpoint.parts[1].variables:
        of_layer = by_layer.setdefault(stored.layer_path, {})
        of_layer[stored.name] = values[stored.name_path]
    layers = {path.rpartition("/")[2]: value for path, value in by_layer.items()}
    up, down = layers["feedforward_intermediate_dense"], layers["feedforward_output_dense"]
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    np.testing.assert_allclose(scale, up["kernel_scale"] / down["awq_scales"][:, None], rtol=2**-23)
    norm, gate = layers["feedforward_layernorm"]["scale"], layers["feedforward_gate_dense"]
    assert len(np.unique(gate["awq_scales"])) > 8
    exported = tensors["model.layers.0.post_attention_layernorm.weight"]
    # Rounded once, in float32 as in bfloat16.
    np.testing.assert_allclose(exported, norm / gate["awq_scales"], rtol=2**-23)
    half = llama.tensors(dtype="bfloat16")["model.layers.0.post_attention_layernorm.weight"]
    np.testing.assert_array_equal(half, exported.astype(ml_dtypes.bfloat16))


def test_a_dense_checkpoint_folds_nothing(llama: Exported) -> None:
    assert llama.checkpoint("dense").folds == {}
    norm = llama.tensors("dense")["model.layers.0.input_layernorm.weight"]
    folded = llama.tensors()["model.layers.0.input_layernorm.weight"]
    assert not np.allclose(norm, folded)


def test_a_finished_export_says_what_it_stores(llama: Exported) -> None:
    store = open_store(str(llama.folder / "export"))
    made = write_checkpoint(llama.checkpoint(), llama.run, llama.manifest, store)
    stored = {row.stored for row in made.tensors if row.scheme}
    assert stored == {"4 bits, asymmetric, groups of 8"}


class TestRefusals:
    def test_scales_of_another_recipe(self, llama: Exported) -> None:
        checkpoint = llama.checkpoint()
        [layer, *_] = checkpoint.folds
        own = {layer: {"awq_scales": np.full(32, 2, np.float32)}}
        places = checkpoint.places
        with pytest.raises(ExportError, match=f"{layer}: .*not of this recipe"):
            divisors({}, own, checkpoint.schemes, places.layouts)
        group = next(group for group in llama.plan.parts[1].groups if len(group.targets) == 3)
        prefix = llama.plan.parts[1].name
        both = {
            f"{prefix}/{name}": {"awq_scales": np.full(32, number + 1, np.float32)}
            for number, name in enumerate(group.targets)
        }
        with pytest.raises(ExportError, match="not of this recipe"):
            divisors(checkpoint.folds, both, checkpoint.schemes, places.layouts)

    def test_a_norm_that_the_checkpoint_has_no_place_for(self, llama: Exported) -> None:
        places = llama.checkpoint().places
        path = next(iter(next(iter(llama.checkpoint().folds.values())).paths))
        constant = Conversion(constant=np.ones(places.shapes[path]))
        other = replace(places, conversions={**places.conversions, path: constant})
        with pytest.raises(ExportError, match=rf"{path}: .*no place for it.*--format dense"):
            folds_of(llama.plan, other)

    def test_groups_across_outputs_of_different_scales(self) -> None:
        variable = FoldedVariable(path="value/kernel", strides=(0, 1))
        codes = KernelCodes(
            format=CodeFormat(bits=4),
            codes=np.zeros((2, 4), np.uint8),
            group=np.zeros((2, 4), np.int32),
            scale=np.ones(1, np.float32),
            zero=np.zeros(1, np.uint8),
        )
        scale = np.array([1, 2, 4, 8], np.float32)
        with pytest.raises(ExportError, match="value/kernel: a group of its weights spans"):
            Divisor(variable, scale).divided_codes(codes)

    def test_scales_of_each_layer_s_own(self, tmp_path: Path, llama: Exported) -> None:
        layers = tuple(
            replace(layer, scheme=AWQScheme(group_size=8)) if layer.scheme else layer
            for layer in llama.plan.parts[1].layers
        )
        parts = (llama.plan.parts[0], replace(llama.plan.parts[1], layers=layers))
        plan = replace(llama.plan, parts=(*parts, *llama.plan.parts[2:]))
        with pytest.raises(ExportError, match=r"awq.*foldable: true.*--format dense"):
            plan_checkpoint(plan, read_preset(str(llama.artifact)), "compressed-tensors")
