from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact.bit_packing import pack_bits, unpack_bits

BITS = st.sampled_from([1, 2, 3, 4, 5, 8])


@given(bits=BITS, rows=st.integers(1, 5), length=st.integers(1, 130), seed=st.integers(0, 2**32))
def test_unpacking_gives_back_the_codes(bits: int, rows: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, length)).astype(np.uint8)
    words = pack_bits(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (rows, -(-length * bits // 32))
    np.testing.assert_array_equal(unpack_bits(words, bits, length), codes)


@given(bits=BITS, codes=st.lists(st.integers(0, 255), min_size=1, max_size=100))
def test_a_row_is_one_number_whose_lowest_bits_are_the_first_code(
    bits: int, codes: list[int]
) -> None:
    codes = [code % 2**bits for code in codes]
    words = pack_bits(np.array(codes, np.uint8), bits)
    number = int.from_bytes(words.astype("<i4").tobytes(), "little")
    assert number == sum(code << i * bits for i, code in enumerate(codes))
