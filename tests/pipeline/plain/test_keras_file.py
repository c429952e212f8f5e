"""A `.keras` file is checked before Keras reads it, and its bytes depend on no time."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.ops import convert_to_numpy

from pipeline.errors import SourceError
from pipeline.plain.keras_file import load_model, model_bytes, read_file
from quantizer import GPTQScheme, HessianSum, Int8Scheme, quantize_layer, quantize_model


def small_model():
    keras.utils.set_random_seed(0)
    x = keras.Input((16,), name="features")
    hidden = layers.Dense(16, activation="relu", name="hidden")(x)
    return keras.Model(x, layers.Dense(16, name="top")(layers.BatchNormalization()(hidden)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = small_model()
    model.compile("adam", "mse")
    model.fit(np.ones((4, 16)), np.ones((4, 16)), verbose=0)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    return path.read_bytes()


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_config(data, change):
    content = members(data)
    config = json.loads(content["config.json"])
    change(config)
    return zipped(content | {"config.json": json.dumps(config)})


def with_weights(data, change):
    content = members(data)
    buffer = io.BytesIO(content["model.weights.h5"])
    with h5py.File(buffer, "r+") as file:
        change(file)
    return zipped(content | {"model.weights.h5": buffer.getvalue()})


KERNEL = "layers/dense/vars/0"


def test_a_trained_model_comes_back_with_its_values_and_names(saved, tmp_path):
    (tmp_path / "model.keras").write_bytes(saved)
    expected = keras.models.load_model(tmp_path / "model.keras")
    loaded = load_model(read_file(str(tmp_path / "model.keras")), "model.keras")
    for ours, theirs in zip(loaded.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(convert_to_numpy(ours), convert_to_numpy(theirs))
    # However many models this process built before.
    assert [layer.path for layer in load_model(saved, "model.keras").layers] == [
        layer.path for layer in loaded.layers
    ]
    assert not loaded.compiled


@pytest.mark.exhaustive
def test_a_written_model_depends_on_the_model_alone_and_is_read_again(saved):
    def quantized():
        model = load_model(saved, "model.keras")
        quantize_model(model, Int8Scheme(), rules={"top": None})
        [_, hidden, _, top] = model.layers
        assert (hidden.quantization_mode, top.quantization_mode) == ("int8", None)
        rows = np.random.default_rng(0).normal(size=(40, 16)).astype("float32")
        quantize_layer(top, GPTQScheme(weight_bits=3, group_size=8), HessianSum.of(rows))
        return model

    first = quantized()
    data = model_bytes(first)
    assert model_bytes(quantized()) == data
    loaded = load_model(data, "model.keras")
    x = np.random.default_rng(1).normal(size=(3, 16)).astype("float32")
    np.testing.assert_array_equal(convert_to_numpy(loaded(x)), convert_to_numpy(first(x)))


def _lambda(config):
    config["config"]["layers"][1]["class_name"] = "Lambda"


def _foreign(config):
    config["config"]["layers"][1]["module"] = "os"


def _unknown(config):
    config["config"]["layers"][1]["class_name"] = "NoSuchLayer"


def _other_units(config):
    config["config"]["layers"][-1]["config"]["units"] = 17


def _not_a_model(config):
    layer = config["config"]["layers"][1]
    config.clear()
    config.update(layer)


BAD_CONFIGS = {
    "Lambda": (_lambda, "refuses 'Lambda'"),
    "a class of another package": (_foreign, "refuses 'Dense' of module 'os'"),
    "a class that Keras has not": (_unknown, "cannot make the model of its config.*NoSuchLayer"),
    "another model's": (_other_units, r"has the shape \[16, 16\].*top/kernel has \[16, 17\]"),
    "a layer's": (_not_a_model, "holds a Dense, not a Keras model"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_is_checked_first(saved, name):
    change, message = BAD_CONFIGS[name]
    with pytest.raises(SourceError, match=f"model.keras: .*{message}"):
        load_model(with_config(saved, change), "model.keras")


def _replaced(value, **options):
    def change(file):
        del file[KERNEL]
        file.create_dataset(KERNEL, data=value, **options)

    return change


def _without(file):
    del file["layers/dense"]


def _linked(file):
    del file[KERNEL]
    file[KERNEL] = h5py.ExternalLink("/etc/hostname", "/")


BAD_WEIGHTS = {
    "missing": (_without, "lacks layers/dense/vars/0, which holds hidden/kernel"),
    "NaN": (_replaced(np.full((16, 16), np.nan, "float32")), "hidden/kernel holds NaN"),
    "another shape": (_replaced(np.zeros((16, 3), "float32")), r"has the shape \[16, 3\]"),
    "a link out of the file": (_linked, "is a ExternalLink"),
    "a decompression bomb": (
        _replaced(np.zeros((1 << 12, 1 << 10), "float32"), compression="gzip"),
        "declares 16",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_must_be_those_of_the_config(saved, name):
    change, message = BAD_WEIGHTS[name]
    with pytest.raises(SourceError, match=f"model.keras: .*{message}"):
        load_model(with_weights(saved, change), "model.keras")


def test_an_archive_must_be_as_keras_writes_it(saved):
    content = members(saved)
    cases = {
        "not a .keras file": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "json is compressed": zipped(content, zipfile.ZIP_DEFLATED),
        "assets, such as vocabularies": zipped(content | {"assets/vocabulary.txt": b"a"}),
        "where config.json, metadata.json": zipped({"config.json": content["config.json"]}),
        "not a JSON object": zipped(content | {"config.json": b"[]"}),
        r"not a \.keras file \(Expecting": zipped(content | {"config.json": b"{"}),
    }
    for message, data in cases.items():
        with pytest.raises(SourceError, match=f"model.keras: .*{message}"):
            load_model(data, "model.keras")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"none\.keras: no such file"):
        read_file(str(tmp_path / "none.keras"))
    with pytest.raises(SourceError, match="a directory"):
        read_file(str(tmp_path))
