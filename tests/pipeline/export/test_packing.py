from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.artifact.bit_packing import unpack_bits
from pipeline.errors import ExportError
from pipeline.export.packing import pack_gptq, pack_quantized

VECTORS = Path(__file__).parent


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
