"""A plain Keras model is quantized in memory, computes so at once, and comes back from a file."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from keras.ops import convert_to_numpy

from quantizer import (
    AWQScheme,
    CalibrationError,
    Float8Scheme,
    GPTQScheme,
    HessianSum,
    Int4Scheme,
    Int8Scheme,
    LayerError,
    SchemeError,
    WeightError,
    quantize_layer,
    quantize_model,
    save_model,
)
from tests.stock import read_kernel, run_layer

GPTQ = GPTQScheme(weight_bits=3, group_size=8)
# Every matrix that gptq or awq solves has one shape, so that their programs compile once.
SIZE = TOKENS = 16


def regression():
    """The first model of Keras' guide on quantization, trained for a moment."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((10,)), layers.Dense(32, activation="relu"), layers.Dense(1)]
    )
    x = np.random.default_rng(0).normal(size=(64, 10)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, x.sum(1, keepdims=True), epochs=2, verbose=0)
    return model, x


def transformer(dtype=None):
    """Tokens, a block of attention and feed-forward, and logits, all of stock Keras."""
    keras.utils.set_random_seed(1)
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(TOKENS, SIZE, name="tokens", dtype=dtype)(tokens)
    attended = layers.MultiHeadAttention(2, 8, name="attention", dtype=dtype)(x, x)
    x = layers.LayerNormalization(dtype=dtype)(x + attended)
    inner = layers.Dense(SIZE, activation="gelu", name="feed_forward_in", dtype=dtype)(x)
    x = x + layers.Dense(SIZE, name="feed_forward_out", dtype=dtype)(inner)
    return keras.Model(tokens, layers.Dense(TOKENS, name="logits", dtype=dtype)(x))


def batches(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TOKENS, (8, 6)).astype("int32") for _ in range(count)]


def answer(model, inputs):
    return convert_to_numpy(model(inputs, training=False)).astype("float32")


def schemes(report):
    return {layer.path: layer.scheme.mode for layer in report.layers if layer.scheme}


def reasons(report):
    return {layer.path: layer.reason for layer in report.layers if layer.reason}


def values(model):
    return {id(v): convert_to_numpy(v.value) for v in model.variables}


ATTENTION = tuple(f"attention/{name}" for name in ("query", "key", "value", "attention_output"))


def trained_to_int8():
    model, x = regression()
    quantize_model(model, Int8Scheme())
    return model, x


def one_layer_to_int4():
    layer = layers.Dense(9, name="alone")
    layer.build((None, 20))
    quantize_layer(layer, Int4Scheme(block_size=8))
    x = np.random.default_rng(1).normal(size=(5, 20)).astype("float32")
    return keras.Sequential([keras.Input((20,)), layer]), x


def mixed():
    model = transformer()
    rules = {"attention": Int4Scheme(block_size=8), "logits": None}
    quantize_model(model, Int8Scheme(), rules=rules, embeddings=Int8Scheme())
    return model, batches()[0]


def gptq():
    model = transformer()
    quantize_model(model, GPTQ, calibration=batches(), embeddings=Int4Scheme(block_size=-1))
    return model, batches()[0]


def awq_and_float8():
    model = transformer()
    rules = {"feed_forward": Float8Scheme()}
    quantize_model(model, AWQScheme(group_size=8), rules=rules, calibration=batches())
    return model, batches()[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "cases",
    [
        # What Keras' guide on quantization shows; one process loads them all.
        [trained_to_int8, one_layer_to_int4, mixed, gptq],
        [awq_and_float8],
    ],
    ids=["of the guide", "others"],
)
def test_stock_keras_loads_each_in_a_fresh_process_and_answers_the_same(cases, tmp_path):
    for case in cases:
        model, inputs = case()
        name = case.__name__
        save_model(model, tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", inputs=inputs, outputs=answer(model, inputs))
    reader = pathlib.Path(__file__).parents[2] / "stock_reader.py"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", reader, tmp_path],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])["differences"]
    assert differences == {case.__name__: 0.0 for case in cases}


def test_the_report_names_every_layer_with_its_scheme_or_why_not():
    model = transformer()
    rules = {"attention": Int4Scheme(block_size=8), "logits": None, "decoder": Int8Scheme()}
    report = quantize_model(model, Int8Scheme(), rules=rules, calibration=batches())
    assert schemes(report) == {
        **dict.fromkeys(ATTENTION, "int4"),
        "feed_forward_in": "int8",
        "feed_forward_out": "int8",
    }
    assert reasons(report) == {
        "tokens": "no scheme was given for embeddings",
        "logits": "the rule 'logits' says so",
    }
    assert report.unused_rules == ("decoder",)
    assert report.quantized_share == 6 / 8
    assert all(layer.report.output_error > 0 for layer in report.layers if layer.scheme)


def test_layers_are_calibrated_on_their_inputs_in_the_float_model_in_one_pass():
    model = transformer()
    inputs = np.concatenate(batches())
    inner = model.get_layer("feed_forward_out")
    hidden = answer(keras.Model(model.input, inner.input), inputs)
    kernel = convert_to_numpy(inner.kernel.value)
    given = iter(batches())
    report = quantize_model(model, GPTQ, calibration=given)
    assert next(given, None) is None
    found = {layer.path: layer.report for layer in report.layers if layer.report}
    assert {report.num_rows for report in found.values()} == {inputs.size}
    # The layer's error speaks of the float model's hidden values.
    delta = hidden @ (read_kernel(inner, kernel.shape) - kernel)
    expected = 2 * np.sum(delta**2) / inputs.size
    assert found["feed_forward_out"].output_error == pytest.approx(expected, rel=1e-3)


def test_a_layer_called_twice_sums_over_its_calls():
    first, second = keras.Input((SIZE,)), keras.Input((SIZE,))
    shared = layers.Dense(SIZE, name="shared")
    model = keras.Model([first, second], shared(first) + shared(shared(second)))
    one, other = np.random.default_rng(0).normal(size=(2, 5, SIZE)).astype("float32")
    kernel = convert_to_numpy(shared.kernel.value)
    rows = np.concatenate([one, other, answer(shared, other)])
    report = quantize_model(model, GPTQ, calibration=[(one, other)])
    [layer] = report.layers
    assert layer.report.num_rows == 15
    delta = rows @ (read_kernel(shared, kernel.shape) - kernel)
    assert layer.report.output_error == pytest.approx(2 * np.sum(delta**2) / 15, rel=1e-3)


def test_batches_may_be_dicts_and_masked_rows_are_left_out():
    tokens = keras.Input((6,), dtype="int32", name="ids")
    x = layers.Embedding(TOKENS, SIZE, mask_zero=True)(tokens)
    model = keras.Model({"ids": tokens}, layers.Dense(SIZE, name="out")(x))
    ids = np.array([[3, 4, 5, 0, 0, 0], [1, 2, 0, 0, 0, 0]], "int32")
    report = quantize_model(model, GPTQ, calibration=[{"ids": ids}])
    assert report.layers[1].report.num_rows == 5


def test_what_is_not_quantized_keeps_its_bits_and_training_goes_on():
    model, x = regression()
    bias = convert_to_numpy(model.layers[0].bias.value)
    kernel = convert_to_numpy(model.layers[1].kernel.value)
    before = model.predict(x, verbose=0)
    quantize_model(model, Int8Scheme(), rules={"dense_?1?$": Int8Scheme()})
    np.testing.assert_array_equal(convert_to_numpy(model.layers[0].bias.value), bias)
    # predict() has been compiled anew.
    after = model.predict(x, verbose=0)
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    np.testing.assert_allclose(after, answer(model, x), rtol=1e-5, atol=1e-6)
    expected = run_layer(
        model.layers[1], read_kernel(model.layers[1], kernel.shape), answer(model.layers[0], x)
    )
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    model.fit(x, x[:, :1], verbose=0)
    assert (convert_to_numpy(model.layers[0].bias.value) != bias).any()


class TestGPTQ:
    """On a classifier that has learned something."""

    @pytest.fixture(scope="class")
    @staticmethod
    def trained():
        keras.utils.set_random_seed(2)
        rng = np.random.default_rng(2)
        centres = 2 * rng.normal(size=(SIZE, SIZE))
        mix = rng.normal(size=(SIZE, SIZE)) * np.geomspace(3, 0.1, SIZE)
        labels = rng.integers(0, SIZE, 3000)
        x = ((centres[labels] + rng.normal(size=(3000, SIZE))) @ mix).astype("float32")
        model = keras.Sequential(
            [
                keras.Input((SIZE,)),
                layers.Dense(SIZE, activation="relu"),
                layers.Dense(SIZE, activation="relu"),
                layers.Dense(SIZE),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
        model.fit(x[:2000], labels[:2000], epochs=12, batch_size=100, verbose=0)
        return model.get_weights(), model.get_config(), x, labels

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("bits", [2, 3])
    def test_loses_less_than_rounding_in_output_and_in_accuracy(self, trained, bits):
        weights, config, x, labels = trained

        def model():
            made = keras.Sequential.from_config(config)
            made.set_weights(weights)
            return made

        def accuracy(model):
            return np.mean(answer(model, x[2000:]).argmax(1) == labels[2000:])

        solved, rounded, before = model(), model(), accuracy(model())
        assert before > 0.9
        scheme = GPTQScheme(weight_bits=bits, group_size=8)
        report = quantize_model(solved, scheme, calibration=[x[:500], x[500:1000]])
        for layer in report.layers:
            assert layer.report.output_error < 0.9 * layer.report.rtn_output_error, layer.path
        # To inputs that are alike and independent, GPTQ is rounding to nearest.
        alike = HessianSum(np.eye(SIZE, dtype="float32"), 1)
        for layer in rounded.layers:
            quantize_layer(layer, dataclasses.replace(scheme, scale_search=False), alike)
        assert accuracy(rounded) < accuracy(solved) <= before
        assert accuracy(solved) > before - {2: 0.25, 3: 0.04}[bits]


class TestLeftInFloat:
    """With the reason in the report."""

    def test_layers_that_stock_keras_has_no_formats_for(self):
        x = inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="conv")(x)
        x = layers.BatchNormalization()(x)
        model = keras.Model(inputs, layers.Dense(5, name="top")(layers.Flatten()(x)))
        before = answer(model, np.ones((1, 8, 8, 3), "float32"))
        report = quantize_model(model, Int8Scheme(quantize_activations=False))
        assert schemes(report) == {"top": "int8"}
        assert reasons(report) == {"conv": "stock Keras cannot load a Conv2D quantized"}
        after = answer(model, np.ones((1, 8, 8, 3), "float32"))
        assert np.abs(after - before).max() < 0.02 * np.abs(before).max()

    @pytest.mark.exhaustive
    def test_what_time_distributed_would_call_past_its_format(self):
        x = keras.Input((5, SIZE))
        inner = keras.Sequential([keras.Input((SIZE,)), layers.Dense(SIZE, name="inner")])
        y = layers.TimeDistributed(inner)(layers.TimeDistributed(layers.Dense(SIZE, name="d"))(x))
        model = keras.Model(x, layers.Dense(2, name="top")(y))
        batch = np.random.default_rng(0).normal(size=(3, 5, SIZE)).astype("float32")
        before = answer(model, batch)
        report = quantize_model(model, Int8Scheme())
        assert [layer.scheme is None for layer in report.layers] == [True, False, False]
        assert "TimeDistributed" in report.layers[0].reason
        assert np.abs(answer(model, batch) - before).max() < 0.05 * np.abs(before).max()

    @pytest.mark.exhaustive
    def test_a_format_that_the_layer_around_would_not_store(self):
        model = transformer()
        # By a policy alone, which is all that MultiHeadAttention stores, int8 rounds inputs too.
        report = quantize_model(model, Int8Scheme(quantize_activations=False))
        assert set(schemes(report)) == {"feed_forward_in", "feed_forward_out", "logits"}
        assert all("would not store" in reasons(report)[path] for path in ATTENTION)

    @pytest.mark.exhaustive
    def test_layers_that_another_process_names_otherwise(self, tmp_path):
        @keras.saving.register_keras_serializable("quantfleet_tests")
        class Gated(layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.gate = layers.Dense(8, dtype=self.dtype_policy)
                self.up = layers.Dense(8, dtype=self.dtype_policy, name="up")

            def build(self, shape):
                self.gate.build(shape)
                self.up.build(shape)

            def call(self, x):
                return self.gate(x) * self.up(x)

        x = keras.Input((8,))
        model = keras.Model(x, layers.Dense(3, name="out")(Gated(name="gated")(x)))
        report = quantize_model(model, Int4Scheme(block_size=8))
        assert set(schemes(report)) == {"gated/up", "out"}
        assert ["names of their own" in why for why in reasons(report).values()] == [True]
        save_model(model, tmp_path / "model.keras")
        batch = np.random.default_rng(0).normal(size=(3, 8)).astype("float32")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(answer(loaded, batch), answer(model, batch))


class TestRefusals:
    """Each names the layer and says what to do; the model stays as it was."""

    @pytest.fixture(autouse=True)
    def _model(self):
        self.model = transformer()

    def refuse(self, error, match, scheme=GPTQ, **options):
        before = values(self.model)
        with pytest.raises(error, match=match):
            quantize_model(self.model, scheme, **options)
        after = values(self.model)
        assert after.keys() == before.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value)

    def test_no_calibration(self):
        self.refuse(CalibrationError, r"attention/query: gptq.*calibration=\[batch")

    def test_an_array_in_place_of_batches(self):
        self.refuse(CalibrationError, r"\(8, 6\).*\[array\]", calibration=batches()[0])
        self.refuse(CalibrationError, "dict.*list", calibration={"x": batches()})

    def test_no_batch(self):
        self.refuse(CalibrationError, "no batch", calibration=iter([]))

    def test_batches_with_labels(self):
        pair = (batches()[0], np.ones(8))
        self.refuse(CalibrationError, "batch 0, a tuple of 2.*without labels", calibration=[pair])

    def test_groups_larger_than_a_layer(self):
        scheme = GPTQScheme(group_size=32)
        self.refuse(
            SchemeError,
            r"attention/query \(32 > 16\).*at most 16",
            scheme,
            calibration=batches(),
        )

    def test_scales_to_fold_into_layers_before(self):
        scheme = AWQScheme(group_size=8, foldable=True)
        self.refuse(
            SchemeError,
            "attention/query: .*preset's blocks.*leave foldable out",
            scheme,
            calibration=batches(),
        )

    def test_nothing_to_quantize(self):
        self.refuse(
            LayerError,
            r"none of its 8 layers.*'logits\|attention",
            None,
            rules={"logits|attention": None},
        )

    def test_schemes_and_patterns_that_are_none(self):
        self.refuse(SchemeError, "'int8' is no scheme", "int8")
        self.refuse(SchemeError, "int8 or int4 only, not gptq", Int8Scheme(), embeddings=GPTQ)
        self.refuse(SchemeError, "no regular expression", Int8Scheme(), rules={"(": None})

    def test_weights_that_are_not_finite(self):
        kernel = self.model.get_layer("logits").kernel
        kernel.assign(kernel.value.at[0, 0].set(np.nan))
        self.refuse(WeightError, "logits.*NaN", Int8Scheme())

    def test_inputs_that_are_not_finite(self):
        table = self.model.get_layer("tokens").embeddings
        table.assign(table.value.at[:].set(np.inf))
        self.refuse(CalibrationError, "batch 0: attention/.*NaN", calibration=batches())


@keras.saving.register_keras_serializable("quantfleet_tests")
class Branching(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used = layers.Dense(SIZE, name="used", dtype=self.dtype_policy)
        self.unused = layers.Dense(SIZE, name="unused", dtype=self.dtype_policy)

    def build(self, shape):
        self.used.build(shape)
        self.unused.build(shape)

    def call(self, x):
        return self.used(x)


def test_a_layer_that_no_batch_reaches_is_named():
    model = Branching()
    model.build((None, SIZE))
    x = np.random.default_rng(0).normal(size=(9, SIZE)).astype("float32")
    with pytest.raises(CalibrationError, match=r"unused: no calibration row.*1 batches"):
        quantize_model(model, GPTQ, calibration=[x])
    with pytest.raises(LayerError, match="used: the layer has no weights yet"):
        quantize_model(Branching(), GPTQ, calibration=[x])


def test_a_subclassed_model_comes_back_if_its_config_says_all(tmp_path):
    model = Branching()
    model.build((None, SIZE))
    x = np.random.default_rng(0).normal(size=(9, SIZE)).astype("float32")
    report = quantize_model(model, GPTQ, rules={"unused": Int8Scheme()}, calibration=[x, x])
    # Only a scheme that needs calibration must see a layer's inputs.
    assert [layer.report.num_rows for layer in report.layers] == [18, 0]
    save_model(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(answer(loaded, x), answer(model, x))


def odd_widths(dtype):
    x = inputs = keras.Input((5, 20))
    x = layers.Dense(13, use_bias=False, name="ragged", dtype=dtype)(x)
    x = layers.Dense(1, name="one", dtype=dtype)(x)
    return keras.Model(inputs, layers.Dense(7, name="from_one", dtype=dtype)(x))


def equations(dtype):
    x = inputs = keras.Input((5, 20))
    for name, equation, shape, bias in [
        ("batched", "abc,bcd->abd", (5, 12), None),
        ("split", "abc,cde->abde", (5, 3, 4), "de"),
        ("join", "abde,dec->abc", (5, 12), "c"),
        ("middle", "btd,ndh->btnh", (5, 3, 4), None),
        ("back", "btnh,nhd->btd", (5, 12), "d"),
        ("ellipsis", "...x,xy->...y", 6, "y"),
    ]:
        x = layers.EinsumDense(equation, shape, bias_axes=bias, name=name, dtype=dtype)(x)
    return keras.Model(inputs, x)


def nested(dtype):
    names = ["same", "other"]
    inner = [layers.Dense(20, name=name, dtype=dtype) for name in names]
    block = keras.Sequential([keras.Input((5, 20)), *inner], name="block")
    x = inputs = keras.Input((5, 20))
    return keras.Model(inputs, layers.Dense(4, name="same", dtype=dtype)(block(block(x))))


ODD_SCHEMES = {
    "gptq": GPTQScheme(group_size=-1),
    "awq": AWQScheme(group_size=-1),
    "int8": Int8Scheme(),
    "int8 weights only": Int8Scheme(quantize_activations=False),
    "int4 blocks of 7": Int4Scheme(block_size=7),
    "float8": Float8Scheme(),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ODD_SCHEMES),
        ("gptq", "bfloat16"),
        ("int8", "bfloat16"),
        ("int4 blocks of 7", "mixed_float16"),
    ],
)
@pytest.mark.parametrize("make", [odd_widths, equations, nested])
def test_odd_models_answer_alike_and_come_back(make, name, dtype, tmp_path):
    keras.utils.set_random_seed(3)
    model = make(dtype)
    x = np.random.default_rng(0).normal(size=(9, 5, 20)).astype("float32")
    before = answer(model, x)
    report = quantize_model(model, ODD_SCHEMES[name], calibration=[x[:4], x[4:]])
    after = answer(model, x)
    assert np.abs(after - before).max() < 0.35 * np.abs(before).max()
    left = {"batched", "ellipsis", "middle"} if name in ("gptq", "awq") else {"ellipsis"}
    assert set(reasons(report)) <= left
    assert ("ellipsis" in reasons(report)) == (make is equations)
    save_model(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(answer(loaded, x), after)
