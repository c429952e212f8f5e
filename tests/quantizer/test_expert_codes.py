"""Codes of experts stand for what stock Keras computes with in the dtype of their variable."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from quantizer import HessianSum, quantize_layer, solve
from quantizer.expert_codes import ExpertCodes, code_format
from quantizer.result import GroupedWeight
from quantizer.schemes import AWQScheme, GPTQScheme
from tests.selection import covering

IN_FEATURES, OUT_FEATURES = 48, 40


@pytest.mark.parametrize(("bits", "dtype"), covering([3, 4, 8], ["float32", "bfloat16", "float16"]))
def test_values_are_those_of_stock_keras_own_quantized_layer(bits: int, dtype: str) -> None:
    scheme = GPTQScheme(weight_bits=bits, group_size=16, scale_search=False)
    rng = np.random.default_rng(bits)
    layer: Any = keras.layers.Dense(OUT_FEATURES, use_bias=False, dtype=dtype)
    layer.build((None, IN_FEATURES))
    layer.kernel.assign(rng.normal(size=(IN_FEATURES, OUT_FEATURES)))
    weight_RC = np.asarray(layer.kernel.value).astype(np.float32).T
    statistics = HessianSum.of(rng.normal(size=(200, IN_FEATURES)).astype(np.float32))
    found = solve(weight_RC, statistics, scheme, scale_dtype=dtype).weight
    assert isinstance(found, GroupedWeight)
    kernel = ExpertCodes.of(found, scheme, 1, dtype).kernel(np.dtype(dtype))
    assert kernel.shape == (1, IN_FEATURES, OUT_FEATURES)
    quantize_layer(layer, scheme, statistics)
    # Rows of the unit matrix give rows of the kernel, exactly.
    expected = np.asarray(layer(np.eye(IN_FEATURES, dtype=dtype)))
    assert str(expected.dtype) == dtype
    np.testing.assert_array_equal(kernel[0], expected)


def test_schemes_without_codes_for_experts_are_refused() -> None:
    with pytest.raises(TypeError, match="awq"):
        code_format(AWQScheme())
