"""Packed codes are stock Keras' own bytes, and come back exactly."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizer.keras_format.packing import pack_nibbles, unpack_nibbles

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7)


@st.composite
def codes_and_axis(draw):
    dtype = draw(st.sampled_from([np.int8, np.uint8]))
    low, high = (-8, 7) if dtype == np.int8 else (0, 15)
    codes = draw(hnp.arrays(dtype, SHAPES, elements=st.integers(low, high)))
    return codes, draw(st.integers(-codes.ndim, codes.ndim - 1))


@given(codes_and_axis())
def test_codes_come_back_exactly(case):
    codes, axis = case
    packed = pack_nibbles(codes, axis)
    assert packed.shape[axis] == -(-codes.shape[axis] // 2)
    restored = unpack_nibbles(packed, codes.shape[axis], axis)
    assert restored.dtype == codes.dtype
    np.testing.assert_array_equal(restored, codes)


@settings(max_examples=15)  # Keras compiles anew for each shape
@given(codes_and_axis())
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
