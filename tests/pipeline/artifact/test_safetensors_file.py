from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

from pipeline.artifact.safetensors_file import safetensors_bytes
from pipeline.errors import ExportError

TENSORS = {
    "a.weight_scale": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.arange(5, dtype=np.int8),
    "a.weight_shape": np.array([2, 3], np.int64),
    "b.weight": np.arange(3).astype(ml_dtypes.bfloat16),
    "c.weight_packed": np.arange(4, dtype=np.int32).reshape(2, 2).T,
}
DTYPES = dict(zip(TENSORS, ("F32", "I8", "I64", "BF16", "I32"), strict=True))


def test_safetensors_reads_what_was_written() -> None:
    found = dict(deserialize(safetensors_bytes(TENSORS)))
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert found[name]["dtype"] == DTYPES[name]
        assert found[name]["shape"] == list(value.shape)
        assert bytes(found[name]["data"]) == value.tobytes()


def test_bytes_do_not_depend_on_the_order_of_tensors() -> None:
    assert safetensors_bytes(TENSORS) == safetensors_bytes(dict(reversed(TENSORS.items())))


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(ExportError, match="x: a safetensors file holds no complex64"):
        safetensors_bytes({"x": np.zeros(2, np.complex64)})
