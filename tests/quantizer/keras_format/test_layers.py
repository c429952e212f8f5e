"""A quantized layer answers as its dequantized weights do, and is just what Keras would leave."""

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy

import quantizer
from quantizer import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    HessianSum,
    Int4Scheme,
    Int8Scheme,
    LayerError,
    MagnitudeSum,
    QuantizationError,
    SchemeError,
    kernel_layout,
    quantize_layer,
)
from tests.selection import by_default, covering
from tests.stock import KERNEL_FORMS, kernel_layer, read_kernel, read_table, run_layer

SCHEMES = {
    "gptq 4 bits": GPTQScheme(group_size=8),
    "gptq 3 bits, ordered, ragged groups": GPTQScheme(
        weight_bits=3, group_size=5, activation_order=True
    ),
    "gptq 2 bits": GPTQScheme(weight_bits=2, group_size=16),
    "gptq 8 bits, symmetric, per channel": GPTQScheme(weight_bits=8, group_size=-1, symmetric=True),
    "awq": AWQScheme(group_size=8),
    "awq ragged groups": AWQScheme(group_size=5),
    "awq per channel": AWQScheme(group_size=-1),
    "int8": Int8Scheme(),
    "int8 weights only": Int8Scheme(quantize_activations=False),
    "int4": Int4Scheme(),
    "int4 blocks": Int4Scheme(block_size=7),
    "int4 per channel": Int4Scheme(block_size=-1),
    "float8": Float8Scheme(),
    "float8 power of two": Float8Scheme(power_of_two=True),
}
ONE_OF_EACH_MODE = ["gptq 4 bits", "awq", "int8", "int4 blocks", "float8"]
EMBEDDING_SCHEMES = {name: s for name, s in SCHEMES.items() if s.mode in ("int8", "int4")}


def calibration(layer, inputs, scheme):
    rng = np.random.default_rng(7)
    rows = rng.normal(size=(40, *inputs.shape[1:])) * rng.uniform(0.2, 2, inputs.shape[-1])
    flat = kernel_layout(layer).flatten_inputs(rows.astype("float32"))
    return (MagnitudeSum if scheme.mode == "float8" else HessianSum).of(flat)


def relative_difference(answer, expected):
    answer = convert_to_numpy(answer).astype("float64")
    return np.abs(answer - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("form", "name"),
    covering(KERNEL_FORMS, SCHEMES, default=(KERNEL_FORMS, ONE_OF_EACH_MODE)),
)
def test_a_stock_layer_answers_as_its_dequantized_kernel(form, name):
    scheme = SCHEMES[name]
    layer, inputs = kernel_layer(form)
    kernel = convert_to_numpy(layer.kernel.value)
    statistics = calibration(layer, inputs, scheme)
    report = quantize_layer(layer, scheme, statistics)

    restored = read_kernel(layer, kernel.shape)
    assert relative_difference(layer(inputs), run_layer(layer, restored, inputs)) <= 1e-5
    # The report speaks of this very kernel.
    error = np.linalg.norm(restored - kernel) / np.linalg.norm(kernel)
    assert report.weight_error == pytest.approx(error, rel=1e-3)
    assert error < {2: 0.6, 3: 0.3}.get(getattr(scheme, "weight_bits", 4), 0.12)


@pytest.mark.parametrize("name", by_default(SCHEMES, ONE_OF_EACH_MODE))
@pytest.mark.parametrize(
    "form", by_default(["dense", "llama query", "gemma query"], ["gemma query"])
)
def test_the_layer_is_what_keras_itself_would_have_left(form, name):
    scheme = SCHEMES[name]
    if name == "int4 blocks":
        scheme = Int4Scheme(block_size=16)  # every group spans zero, where Keras is right, too
    ours, inputs = kernel_layer(form)
    theirs, _ = kernel_layer(form)
    quantize_layer(ours, scheme, calibration(ours, inputs, scheme))
    config = ours.quantization_config
    theirs.quantize(scheme.mode, config=config)
    if scheme.mode in ("gptq", "awq"):
        del theirs._kernel  # what Keras' own calibration does after it has filled the layer
        setattr(theirs, f"is_{scheme.mode}_calibrated", True)

    assert ours.dtype_policy == theirs.dtype_policy
    assert ours.quantization_mode == theirs.quantization_mode == scheme.mode
    assert ours.get_config().keys() == theirs.get_config().keys()

    def shapes(layer):
        return [(v.name, tuple(v.shape), v.dtype, v.trainable) for v in layer.weights]

    assert shapes(ours) == shapes(theirs)
    if scheme.mode in ("int8", "int4"):
        # No calibration in these modes: the values are Keras' own, bit for bit.
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_array_equal(
                convert_to_numpy(mine.value), convert_to_numpy(other.value), err_msg=mine.name
            )


@pytest.mark.parametrize(("kind", "name"), covering(["plain", "tied", "untied"], EMBEDDING_SCHEMES))
def test_a_stock_embedding_answers_as_its_dequantized_table(kind, name):
    scheme = EMBEDDING_SCHEMES[name]
    if kind == "plain":
        layer = keras.layers.Embedding(29, 23, name="tokens")
    else:
        layer = keras.layers.ReversibleEmbedding(29, 23, tie_weights=kind == "tied", name="tokens")
    layer.build()
    before = convert_to_numpy(layer._embeddings.value)
    report = quantize_layer(layer, scheme)

    ids = np.arange(29)[None]
    table = read_table(layer)
    assert relative_difference(layer(ids), table[None]) <= 1e-5
    error = np.linalg.norm(table - before) / np.linalg.norm(before)
    assert report.weight_error == pytest.approx(error, rel=1e-3)
    assert error < 0.12
    if kind == "plain":
        return
    hidden = np.random.default_rng(3).normal(size=(2, 5, 23)).astype("float32")
    back = table if kind == "tied" else read_table(layer, reverse=True)
    if layer.inputs_quantizer is not None:
        scale = np.float32(127) / (np.abs(hidden).max(-1, keepdims=True) + np.float32(1e-7))
        hidden = (np.round(hidden * scale) / scale).astype("float64")
    assert relative_difference(layer(hidden, reverse=True), hidden @ back.T) <= 1e-5


@pytest.mark.parametrize(
    "dtype", by_default(["bfloat16", "float16", "mixed_bfloat16"], ["bfloat16"])
)
@pytest.mark.parametrize(
    "name", by_default(["gptq 4 bits", "awq", "int4 blocks", "float8"], ["gptq 4 bits", "float8"])
)
def test_narrow_layers_get_codes_for_the_scales_they_store(name, dtype):
    scheme = SCHEMES[name]
    layer, inputs = kernel_layer("llama query", dtype=dtype)
    kernel = convert_to_numpy(layer.kernel.value).astype("float64")
    report = quantize_layer(layer, scheme, calibration(layer, inputs, scheme))
    restored = read_kernel(layer, kernel.shape)
    error = np.linalg.norm(restored - kernel) / np.linalg.norm(kernel)
    # Scales are rounded to the layer's dtype before codes are found: nothing is lost after.
    assert report.weight_error == pytest.approx(error, rel=0.02)
    expected = run_layer(layer, restored, inputs)
    assert relative_difference(layer(inputs), expected) < 0.03


def test_int8_in_float16_is_refused_as_keras_refuses_it():
    layer, _ = kernel_layer("dense", dtype="float16")
    with pytest.raises(LayerError, match=r"dense.*float16"):
        quantize_layer(layer, Int8Scheme())


@pytest.mark.exhaustive
def test_gemmas_query_may_have_groups_that_span_heads():
    layer, inputs = kernel_layer("gemma query")
    kernel = convert_to_numpy(layer.kernel.value)
    scheme = GPTQScheme(weight_bits=3, group_size=36)  # 48 inputs a head: 36 | 12 + 24 | …
    report = quantize_layer(layer, scheme, calibration(layer, inputs, scheme))
    assert layer.kernel_scale.shape == (8, 6)
    restored = read_kernel(layer, kernel.shape)
    assert relative_difference(layer(inputs), run_layer(layer, restored, inputs)) <= 1e-5
    assert report.output_error < report.rtn_output_error


@pytest.mark.parametrize(
    "form",
    by_default(
        ["dense", "llama query", "llama output", "gemma query", "gemma output"], ["gemma query"]
    ),
)
def test_the_reported_output_error_is_that_of_the_kernel_on_its_inputs(form):
    layer, inputs = kernel_layer(form)
    kernel = convert_to_numpy(layer.kernel.value).astype("float64")
    layout = kernel_layout(layer)
    rows = layout.flatten_inputs(np.random.default_rng(5).normal(size=(60, *inputs.shape[1:])))
    hessian = HessianSum.of(rows)
    report = quantize_layer(layer, GPTQScheme(weight_bits=3, group_size=8), hessian)
    delta_RC = layout.to_matrix(read_kernel(layer, kernel.shape) - kernel)
    flat = rows.reshape(-1, layout.in_features).astype("float64")
    expected = 2 * np.sum((flat @ delta_RC.T) ** 2) / flat.shape[0]
    assert report.output_error == pytest.approx(expected, rel=1e-3)


class TestRefusals:
    """Each names the layer and says what to do; the layer stays as it was."""

    def test_a_layer_without_weights(self):
        with pytest.raises(LayerError, match=r"late.*call it once"):
            quantize_layer(keras.layers.Dense(4, name="late"), Int8Scheme())

    def test_a_layer_quantized_before(self):
        layer, _ = kernel_layer("dense")
        quantize_layer(layer, Int8Scheme())
        with pytest.raises(LayerError, match=r"dense.*already quantized"):
            quantize_layer(layer, Int4Scheme())

    def test_a_layer_with_lora(self):
        layer, _ = kernel_layer("dense")
        layer.enable_lora(2)
        with pytest.raises(LayerError, match=r"dense.*merge it"):
            quantize_layer(layer, Int8Scheme())

    def test_a_subclass_and_another_type(self):
        class Mine(keras.layers.Dense):
            pass

        mine = Mine(4, name="mine")
        mine.build((None, 4))
        norm = keras.layers.LayerNormalization(name="norm")
        norm.build((None, 4))
        for layer in (mine, norm):
            with pytest.raises(LayerError, match=layer.name):
                quantize_layer(layer, Int8Scheme())

    @pytest.mark.parametrize("scheme", [GPTQScheme(), AWQScheme(), Float8Scheme()])
    def test_an_embedding_in_a_mode_that_keras_has_not(self, scheme):
        layer = keras.layers.Embedding(8, 4, name="tokens")
        layer.build()
        with pytest.raises(LayerError, match=r"tokens.*Int8Scheme"):
            quantize_layer(layer, scheme)

    @pytest.mark.parametrize("scheme", [GPTQScheme(group_size=8), AWQScheme(group_size=8)])
    @pytest.mark.parametrize("form", ["dense", "gemma query"])
    def test_no_calibration(self, form, scheme):
        layer, _ = kernel_layer(form)
        with pytest.raises(QuantizationError, match=layer.name):
            quantize_layer(layer, scheme)

    @pytest.mark.parametrize("form", ["dense", "gemma query"])
    def test_a_group_larger_than_the_inputs(self, form):
        layer, inputs = kernel_layer(form)
        scheme = GPTQScheme(group_size=64)
        with pytest.raises(SchemeError, match=rf"{layer.name}.*64.*48"):
            quantize_layer(layer, scheme, calibration(layer, inputs, scheme))

    def test_leave_the_layer_untouched(self):
        layer, inputs = kernel_layer("dense")
        before = convert_to_numpy(layer(inputs))
        bad = HessianSum(np.full((48, 48), np.nan, "float32"), 4)
        with pytest.raises(QuantizationError, match="dense"):
            quantize_layer(layer, GPTQScheme(group_size=8), bad)
        np.testing.assert_array_equal(convert_to_numpy(layer(inputs)), before)
        assert layer.quantization_mode is None


def test_own_variables_load_into_a_stock_layer():
    layer, inputs = kernel_layer("llama query")
    scheme = GPTQScheme(group_size=8)
    quantize_layer(layer, scheme, calibration(layer, inputs, scheme))
    fresh = keras.layers.EinsumDense.from_config(layer.get_config())
    fresh.build(inputs.shape)
    stored = quantizer.keras_format.layers.own_variables(layer)
    fresh.load_own_variables({str(i): value.value for i, value in enumerate(stored.values())})
    np.testing.assert_array_equal(convert_to_numpy(fresh(inputs)), convert_to_numpy(layer(inputs)))
