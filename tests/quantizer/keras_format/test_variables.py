"""What a stored layer stands for, against the independent reading in tests/stock.py."""

import numpy as np
import pytest

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
from quantizer.keras_format.variables import decode_kernel
from tests.selection import covering
from tests.stock import kernel_layer, read_kernel

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
def test_restored_kernel_is_what_stock_keras_reads(form, policy):
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
    variables = dict(zip(present, own_variables(layer), strict=True))
    restored = decode_kernel(variables, layout, scheme)
    assert restored.dtype == np.float32
    expected = read_kernel(layer, layout.shape)
    np.testing.assert_allclose(restored, expected, rtol=1e-6, atol=1e-7)
