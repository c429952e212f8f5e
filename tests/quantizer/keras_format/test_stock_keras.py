"""What quantfleet saves loads in stock Keras, in a fresh process that has no quantfleet."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from quantizer import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    quantize_model,
    save_model,
)

SCHEMES = {
    "gptq-w2": GPTQScheme(weight_bits=2, group_size=16),
    "gptq-w3-ordered-ragged": GPTQScheme(weight_bits=3, group_size=20, activation_order=True),
    "gptq-w4": GPTQScheme(group_size=16, activation_order=True),
    "gptq-w8-per-channel": GPTQScheme(weight_bits=8, group_size=-1, symmetric=True),
    "awq": AWQScheme(group_size=16),
    "int8-weights-only": Int8Scheme(quantize_activations=False),
    "int4": Int4Scheme(block_size=16),
    "int4-per-channel": Int4Scheme(block_size=-1),
}
ROUNDING_INPUTS = {"int8": Int8Scheme(), "float8": Float8Scheme()}


def every_layer_type():
    """Embedding, all kernel forms of the supported architectures, and a tied way back."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((6,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(61, 48, name="tokens")
    x = embedding(tokens)
    forms = [
        ("bqm,muh->bquh", (None, 4, 12)),  # Llama, GPT-2
        ("bquh,uhm->bqm", (None, 48)),
        ("btd,ndh->btnh", (None, 3, 16)),  # Gemma, whose kernel has its inputs in the middle
        ("btnh,nhd->btd", (None, 48)),
        ("btd,df->btf", (None, 57)),
    ]
    for equation, shape in forms:
        x = keras.layers.EinsumDense(equation, shape, bias_axes=equation[-1])(x)
    x = keras.layers.Dense(48, activation="gelu")(x)
    position = keras.layers.Embedding(6, 48, name="positions")(tokens % 6)
    return keras.Model(tokens, embedding(x + position, reverse=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    inputs = np.random.default_rng(0).integers(0, 61, (32, 6)).astype("int32")
    for name, scheme in (SCHEMES | ROUNDING_INPUTS).items():
        model = every_layer_type()
        plain = isinstance(scheme, Int8Scheme | Int4Scheme)
        embeddings = scheme if plain else Int8Scheme(quantize_activations=False)
        report = quantize_model(model, scheme, embeddings=embeddings, calibration=[inputs])
        assert report.quantized_share == 1
        save_model(model, folder / f"{name}.keras")
        np.savez(folder / f"{name}.npz", inputs=inputs, outputs=np.asarray(model(inputs)))
    return folder


def read(folder, backend):
    reader = pathlib.Path(__file__).parents[2] / "stock_reader.py"
    result = subprocess.run(
        [sys.executable, reader, folder],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["backend"] == backend
    assert report["differences"].keys() == (SCHEMES | ROUNDING_INPUTS).keys()
    return report["differences"]


def check(differences):
    for name in SCHEMES:
        assert differences[name] <= 1e-5, name
    for name in ROUNDING_INPUTS:
        # These round their inputs at run time: where two backends' float32 noise straddles a
        # rounding edge one input moves by a whole step, which is 1/127 or 1/16 of it.
        assert differences[name] <= 2e-2, name


@pytest.mark.slow  # two minutes of models; layers are compared one by one in test_layers
def test_stock_keras_on_jax_loads_what_was_saved(saved):
    check(read(saved, "jax"))


@pytest.mark.torch
def test_stock_keras_on_torch_loads_what_was_saved(saved):
    check(read(saved, "torch"))
