"""Codes of experts come back from their file, and damage is found."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pipeline.artifact.codes_file import codes_file_bytes, read_codes_file
from pipeline.artifact.safetensors_file import read_safetensors, safetensors_bytes
from pipeline.errors import WeightsFileError
from quantizer.expert_codes import ExpertCodes

IN_FEATURES = 40


def bank(bits: int, *, group_size: int = 16, symmetric: bool = False, seed: int = 0) -> ExpertCodes:
    """Of 3 experts with 5 outputs."""
    rng = np.random.default_rng(seed)
    groups = (3, 5, 1 if group_size == -1 else -(-IN_FEATURES // group_size))
    zeros = rng.integers(0, 2**bits, groups).astype(np.uint8)
    return ExpertCodes(
        codes_ERC=rng.integers(0, 2**bits, (3, 5, IN_FEATURES)).astype(np.uint8),
        scale_ERG=rng.uniform(0.01, 1, groups).astype(ml_dtypes.bfloat16),
        zero_ERG=np.full(groups, 2 ** (bits - 1), np.uint8) if symmetric else zeros,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def assert_same(one: ExpertCodes, other: ExpertCodes) -> None:
    for name in ("codes_ERC", "scale_ERG", "zero_ERG"):
        value, again = getattr(one, name), getattr(other, name)
        assert value.dtype == again.dtype
        np.testing.assert_array_equal(value, again)
    for name in ("bits", "group_size", "symmetric"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_codes_come_back(bits: int, symmetric: bool, group_size: int) -> None:
    made = bank(bits, group_size=group_size, symmetric=symmetric)
    data = codes_file_bytes({"block/experts/gate": made})
    [(path, found)] = read_codes_file(data).items()
    assert path == "block/experts/gate"
    assert_same(found, made)
    in_file, _ = read_safetensors(data)
    assert (f"{path}.zeros" in in_file) == (not symmetric)
    packed_bits = 8 * in_file[f"{path}.codes"].nbytes
    assert packed_bits < 3 * 5 * (IN_FEATURES * bits + 32)


def test_bytes_do_not_depend_on_the_order_of_banks() -> None:
    banks = {"a/up": bank(4), "a/down": bank(3, seed=1)}
    data = codes_file_bytes(banks)
    assert data == codes_file_bytes(dict(reversed(banks.items())))
    assert read_codes_file(data).keys() == banks.keys()


def test_values_are_codes_less_zeros_times_the_scale_of_the_group_of_their_input() -> None:
    made = bank(3)
    values = np.stack([made.dequantize(expert) for expert in range(3)])
    for expert, row, column in [(0, 0, 0), (2, 4, 39), (1, 3, 15), (1, 3, 16)]:
        group = column // 16
        scale = np.float32(made.scale_ERG[expert, row, group])
        code, zero = made.codes_ERC[expert, row, column], made.zero_ERG[expert, row, group]
        assert values[expert, row, column] == (np.float32(code) - np.float32(zero)) * scale
    kernel = made.kernel(np.dtype(ml_dtypes.bfloat16))
    assert kernel.shape == (3, IN_FEATURES, 5)
    np.testing.assert_array_equal(kernel.transpose(0, 2, 1), values.astype(ml_dtypes.bfloat16))


def spoiled(**changed: Any) -> bytes:
    tensors, metadata = read_safetensors(codes_file_bytes({"a": bank(4)}))
    metadata["a"] = json.dumps(json.loads(metadata["a"]) | changed)
    return safetensors_bytes(tensors, metadata)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        codes_file_bytes({"a": bank(4)})[:-1],
        codes_file_bytes({"a": bank(4)})[:200],
        spoiled(bits=3),
        spoiled(bits="4"),
        spoiled(in_features=4000),
        spoiled(group_size=8),
        spoiled(group_size=0),
        spoiled(symmetric=True),
        safetensors_bytes({"a.codes": np.zeros(3, np.int32)}, {}),
        safetensors_bytes({}, {"a": "[]"}),
        safetensors_bytes({}, {"a": "{"}),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(WeightsFileError):
        read_codes_file(data)


def test_no_memory_is_taken_for_inputs_that_a_file_does_not_have() -> None:
    tensors, metadata = read_safetensors(codes_file_bytes({"a": bank(4, symmetric=True)}))
    claimed = json.loads(metadata["a"]) | {"in_features": 10**13, "group_size": 1}
    with pytest.raises(WeightsFileError, match="words"):
        read_codes_file(safetensors_bytes(tensors, {"a": json.dumps(claimed)}))
