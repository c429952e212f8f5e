"""Variables decode to what stock Keras reads, and 4-bit codes are packed as stock Keras packs."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    HessianSum,
    Int4Scheme,
    Int8Scheme,
    MagnitudeSum,
    kernel_layout,
    quantize_layer,
)
from quantizer.keras_format.layers import own_variables
from quantizer.keras_format.variables import (
    decode_embedding,
    decode_kernel,
    decode_on_device,
    pack_nibbles,
    unpack_nibbles,
)
from tests.selection import covering
from tests.stock import KERNEL_FORMS, kernel_layer, read_kernel, read_table
from tests.stored_variables import random_variables

SCHEMES = {
    scheme.policy: scheme
    for scheme in (
        GPTQScheme(weight_bits=4, group_size=16),
        GPTQScheme(weight_bits=3, group_size=-1, activation_order=True),
        AWQScheme(group_size=16),
        Int8Scheme(),
        Int4Scheme(block_size=16),
        Int4Scheme(block_size=-1),
        Float8Scheme(),
    )
}


@pytest.mark.parametrize(
    ("form", "policy"), covering(["dense", "llama output", "gemma query", "odd outputs"], SCHEMES)
)
def test_a_decoded_kernel_is_what_stock_keras_reads(form, policy):
    scheme = SCHEMES[policy]
    layer, inputs = kernel_layer(form)
    layout = kernel_layout(layer)
    kind = MagnitudeSum if isinstance(scheme, Float8Scheme) else HessianSum
    quantize_layer(layer, scheme, kind.of(layout.flatten_inputs(inputs)))
    names = layer.variable_serialization_spec[layer.quantization_mode]
    present = [
        name
        for name in names
        if getattr(layer, f"_{name}" if name == "kernel" else name, None) is not None
    ]
    stored = own_variables(layer)
    assert list(stored) == present
    variables = {name: keras.ops.convert_to_numpy(value) for name, value in stored.items()}
    decoded = decode_kernel(variables, layout, scheme)
    assert decoded.dtype == np.float32
    expected = read_kernel(layer, layout.shape)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-7)


EVERY_WIDTH = {
    f"gptq/{bits}": GPTQScheme(weight_bits=bits, group_size=16) for bits in (2, 3, 4, 8)
} | {policy: scheme for policy, scheme in SCHEMES.items() if scheme.mode != "gptq"}


@pytest.mark.parametrize(("form", "policy"), covering(KERNEL_FORMS, EVERY_WIDTH))
def test_a_device_decodes_to_the_bits_that_the_host_does(form, policy):
    scheme, layout = EVERY_WIDTH[policy], kernel_layout(kernel_layer(form)[0])
    variables = random_variables(layout, scheme, np.random.default_rng(0))
    expected = decode_kernel(variables, layout, scheme)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 50
    for dtype in ("float32", "bfloat16"):
        found = np.asarray(decode_on_device(variables, layout, scheme, dtype))
        assert found.dtype == np.dtype(dtype)
        assert found.shape == layout.shape
        assert found.tobytes() == expected.astype(dtype).tobytes()


SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7)
FEW_SHAPES = st.sampled_from([(5,), (3, 4)])  # Keras compiles anew for each


@st.composite
def codes_and_axis(draw, shapes=SHAPES):
    dtype = draw(st.sampled_from([np.int8, np.uint8]))
    low, high = (-8, 7) if dtype == np.int8 else (0, 15)
    codes = draw(hnp.arrays(dtype, shapes, elements=st.integers(low, high)))
    return codes, draw(st.integers(-codes.ndim, codes.ndim - 1))


@given(codes_and_axis())
def test_codes_come_back_exactly(case):
    codes, axis = case
    packed = pack_nibbles(codes, axis)
    assert packed.shape[axis] == -(-codes.shape[axis] // 2)
    restored = unpack_nibbles(packed, codes.shape[axis], axis)
    assert restored.dtype == codes.dtype
    np.testing.assert_array_equal(restored, codes)


@settings(max_examples=12)
@given(codes_and_axis(FEW_SHAPES))
def test_bytes_are_those_of_keras(case):
    codes, axis = case
    dtype = codes.dtype.name
    packed, _, length = keras.quantizers.pack_int4(codes, axis=axis, dtype=dtype)
    ours = pack_nibbles(codes, axis)
    assert ours.dtype == codes.dtype
    np.testing.assert_array_equal(ours, np.asarray(packed))
    theirs = keras.quantizers.unpack_int4(ours, length, axis=axis, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(theirs), codes)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_need_not_be_contiguous(axis):
    codes = np.arange(60, dtype=np.uint8).reshape(6, 10)[::-1, ::2] % 16
    np.testing.assert_array_equal(
        pack_nibbles(codes, axis), pack_nibbles(np.ascontiguousarray(codes), axis)
    )


def test_results_are_contiguous_and_the_codes_untouched():
    codes = np.arange(15, dtype=np.uint8).reshape(3, 5)
    before = codes.copy()
    packed = pack_nibbles(codes, 1)
    assert packed.flags.c_contiguous
    assert unpack_nibbles(packed, 5, 1).flags.c_contiguous
    np.testing.assert_array_equal(codes, before)


@pytest.mark.parametrize(
    "scheme", [Int8Scheme(), Int4Scheme(block_size=4), Int4Scheme(block_size=-1)]
)
def test_tables_decode_to_those_that_stock_keras_looks_up(scheme):
    layer = keras.layers.ReversibleEmbedding(11, 7, tie_weights=False, name="tokens")
    layer.build()
    quantize_layer(layer, scheme)
    own = {name: np.asarray(variable) for name, variable in own_variables(layer).items()}
    for reverse in (False, True):
        table = decode_embedding(own, scheme, 7, reverse=reverse)
        expected = read_table(layer, reverse=reverse)
        np.testing.assert_allclose(table.T if reverse else table, expected, rtol=1e-6)
