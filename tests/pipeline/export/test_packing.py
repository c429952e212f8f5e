from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.packing import pack_bits, pack_gptq, pack_quantized, unpack_bits

VECTORS = Path(__file__).parent
BITS = st.sampled_from([1, 2, 3, 4, 5, 8])


def cases(file: str) -> list[Any]:
    """What another library packed, each array as the hexadecimal text of its bytes."""
    found: list[Any] = json.loads((VECTORS / file).read_text())["cases"]
    return found


def codes_of(text: str, *shape: int) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(shape)


@pytest.mark.parametrize("case", cases("compressed_tensors_packed.json"))
def test_words_are_those_of_compressed_tensors(case: dict[str, Any]) -> None:
    codes = codes_of(case["codes"], *case["shape"])
    weight, zero = pack_quantized(codes, codes, case["bits"])
    assert weight.astype("<i4").tobytes().hex() == case["packed"]
    assert zero is not None
    assert zero.astype("<i4").tobytes().hex() == case["packed_along_rows"]


@pytest.mark.parametrize("case", cases("gptqmodel_packed.json"))
def test_words_are_those_of_gptqmodel(case: dict[str, Any]) -> None:
    codes = codes_of(case["codes"], *case["shape"])
    zeros = codes_of(case["zeros"], case["shape"][0], case["groups"])
    weight, zero = pack_gptq(codes, zeros, case["bits"], zero_minus_one=False, name="layer")
    assert weight.astype("<i4").tobytes().hex() == case["qweight"]
    assert zero.astype("<i4").tobytes().hex() == case["qzeros"]


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


def test_a_symmetric_scheme_stores_no_zero_points() -> None:
    assert pack_quantized(np.zeros((2, 32), np.uint8), None, 4)[1] is None


@given(bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**32))
def test_the_old_gptq_format_holds_each_zero_point_less_one(bits: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (32, 32)).astype(np.uint8)
    zeros = random.integers(0, 2**bits, (32, 1)).astype(np.uint8)
    _, stored = pack_gptq(codes, zeros, bits, zero_minus_one=True, name="layer")
    read = (unpack_bits(stored, bits, 32).astype(int) + 1) % 2**bits  # as its readers do
    np.testing.assert_array_equal(read, zeros.T)


@pytest.mark.parametrize(("shape", "axis"), [((32, 24), "24 inputs"), ((24, 32), "24 outputs")])
def test_gptq_refuses_what_does_not_fill_words(shape: tuple[int, int], axis: str) -> None:
    codes = np.zeros(shape, np.uint8)
    with pytest.raises(ExportError, match=f"q_proj: {axis} of 3 bits .*compressed-tensors"):
        pack_gptq(codes, codes[:, :1], 3, zero_minus_one=False, name="q_proj")
