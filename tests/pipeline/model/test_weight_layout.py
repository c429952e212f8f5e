"""The layout is that of the file which Keras itself writes, and which its loader reads."""

import h5py
import keras
import numpy as np
import pytest
from keras.src.backend.common import global_state

from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.model.weight_layout import weight_layout
from quantizer import Int4Scheme, Int8Scheme, quantize_layer
from tests.models.tiny import ARCHITECTURES, tiny_preset
from tests.selection import by_default


def file_content(path):
    found = {}

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            dtype = item.attrs.get("dtype", item.dtype.name)
            found[name] = (item.shape, dtype)

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def layout_content(model, **options):
    return {v.key: (v.shape, v.dtype) for v in weight_layout(model, **options)}


@pytest.mark.parametrize("family", by_default(sorted(ARCHITECTURES), ["Bert", "Llama3"]))
def test_layout_of_a_skeleton_is_that_of_the_preset_it_was_built_from(family, tmp_path):
    tiny_preset(family, tmp_path, dtype="bfloat16", num_blocks=1)
    backbone = build_skeleton(read_preset(str(tmp_path))).backbone
    assert layout_content(backbone) == file_content(tmp_path / "model.weights.h5")


def test_layout_of_a_task_without_its_backbone_is_that_of_the_task_weights(tmp_path):
    tiny_preset("Bert", tmp_path, num_blocks=1)
    task = build_skeleton(read_preset(str(tmp_path))).task
    found = layout_content(task, skip=task.backbone._flatten_layers())
    stored = file_content(tmp_path / "task.weights.h5")
    # The skeleton is not compiled.
    assert found == {key: kind for key, kind in stored.items() if not key.startswith("optimizer/")}


def quantized_layers():
    """One of each layer that stock Keras can save quantized, with and without a bias."""
    inputs = keras.Input((8,), dtype="int32")
    embed = keras.layers.ReversibleEmbedding(20, 6, tie_weights=False, name="embed")
    x = embed(inputs)
    x = keras.layers.Dense(6, name="dense")(x)
    x = keras.layers.EinsumDense("btd,df->btf", (None, 6), name="einsum")(x)
    return keras.Model(inputs, embed(x, reverse=True))


@pytest.mark.parametrize(
    "scheme",
    by_default(
        [Int8Scheme(), Int4Scheme(block_size=2), Int4Scheme(block_size=-1)],
        [Int8Scheme()],
    ),
)
def test_layout_of_quantized_layers_is_that_of_the_file_keras_writes(scheme, tmp_path):
    model = quantized_layers()
    for name in ("embed", "dense", "einsum"):
        quantize_layer(model.get_layer(name), scheme)
    model.save_weights(tmp_path / "model.weights.h5")
    assert layout_content(model) == file_content(tmp_path / "model.weights.h5")


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ("gptq/4/16", ["bias", "quantized_kernel", "kernel_scale", "kernel_zero", "g_idx"]),
        (
            "awq/4/16",
            ["bias", "quantized_kernel", "kernel_scale", "kernel_zero", "awq_scales", "g_idx"],
        ),
    ],
)
def test_zero_points_that_keras_forgets_to_save_have_their_place(policy, names):
    # Keras 3.15.1's loader reads them; its saver does not write them.
    layer = keras.layers.Dense(32, dtype=f"{policy}_from_float32", name="dense")
    model = keras.Sequential([keras.Input((64,)), layer], name="model")
    layout = weight_layout(model)
    assert [variable.name for variable in layout] == names
    assert [variable.index for variable in layout] == list(range(len(names)))
    assert {variable.h5_group for variable in layout} == {"layers/dense/vars"}
    assert {variable.layer_path for variable in layout} == {"model/dense"}
    assert layer.variable_serialization_spec[layer.quantization_mode] == names


def test_place_survives_quantization_though_the_key_does_not():
    def bias_of(dtype):
        model = keras.Sequential(
            [keras.Input((64,)), keras.layers.Dense(32, dtype=dtype)], name="model"
        )
        [bias] = [variable for variable in weight_layout(model) if variable.name == "bias"]
        return bias

    before, after = bias_of("float32"), bias_of("gptq/4/16_from_float32")
    assert before.name_path == after.name_path == "layers/dense/bias"
    assert before.key != after.key


def test_the_walk_leaves_the_model_as_it_was():
    model = quantized_layers()
    quantize_layer(model.get_layer("dense"), Int8Scheme())
    values = [np.asarray(variable.value) for variable in model.variables]
    weight_layout(model)
    assert all("save_own_variables" not in vars(layer) for layer in model.layers)
    for variable, value in zip(model.variables, values, strict=True):
        np.testing.assert_array_equal(variable.value, value)


def test_bytes_are_counted_as_they_lie_in_memory():
    layers = [keras.layers.Dense(3, dtype="bfloat16"), keras.layers.Dense(5, dtype="float32")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="model")
    assert sum(variable.num_bytes for variable in weight_layout(model)) == 2 * 15 + 4 * 20


def test_the_walk_leaves_keras_global_state_as_it_was():
    name = "saving_attr_skiplist_Layer"
    weight_layout(quantized_layers())
    assert global_state.get_global_attribute(name) is None
    global_state.set_global_attribute(name, {"kept"})
    try:
        weight_layout(quantized_layers())
        assert global_state.get_global_attribute(name) == {"kept"}
    finally:
        global_state.set_global_attribute(name, None)


def test_keras_is_asked_only_once_which_attributes_of_a_layer_it_passes_over(monkeypatch):
    model = keras.Sequential(
        [keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(30))], name="model"
    )
    built = 0
    original = keras.layers.Layer.__init__

    def counting(self, **options):
        nonlocal built
        built += 1
        original(self, **options)

    monkeypatch.setattr(keras.layers.Layer, "__init__", counting)
    assert len(weight_layout(model)) == 60
    assert built <= 4  # one for each kind of object
