from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import ExportError
from pipeline.export.codes import kernel_codes
from quantizer.hessian import HessianSum, MagnitudeSum
from quantizer.keras_format.layers import kernel_layout, own_variables, quantize_layer
from quantizer.schemes import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    Scheme,
)
from tests.stock import KERNEL_FORMS, kernel_layer, read_kernel

SCHEMES: dict[str, Scheme] = {
    "gptq 4": GPTQScheme(weight_bits=4, group_size=8),
    "gptq 3": GPTQScheme(weight_bits=3, group_size=8, symmetric=True),
    "gptq per channel": GPTQScheme(weight_bits=8, group_size=-1),
    "int8": Int8Scheme(),
    "int4": Int4Scheme(block_size=8),
    "int4 per channel": Int4Scheme(block_size=-1),
    "float8": Float8Scheme(),
}


# A layout of each kind, in a scheme of each kind.
DEFAULT = {("gemma query", "gptq 4"), ("llama query", "int8"), ("gpt2 query", "int4")}
CASES = [
    pytest.param(form, name, marks=() if (form, name) in DEFAULT else pytest.mark.exhaustive)
    for form in KERNEL_FORMS
    for name in SCHEMES
]


def quantized(form: str, scheme: Scheme) -> tuple[Any, Any]:
    """A stock Keras layer quantized in place, and its layout."""
    layer, inputs = kernel_layer(form)
    layout = kernel_layout(layer)
    rows = layout.flatten_inputs(inputs)
    statistics = MagnitudeSum if isinstance(scheme, Float8Scheme) else HessianSum
    quantize_layer(layer, scheme, statistics.of(rows))
    return layer, layout


@pytest.mark.parametrize(("form", "scheme"), CASES)
def test_codes_are_the_weights_that_stock_keras_computes_with(form: str, scheme: str) -> None:
    layer, layout = quantized(form, SCHEMES[scheme])
    variables = {name: np.asarray(value) for name, value in own_variables(layer).items()}
    found = kernel_codes(variables, layout, SCHEMES[scheme], form)
    codes = found.codes.astype(np.float64)
    zero = 0 if found.format.is_float else found.zero[found.group].astype(np.float64)
    values = (codes - zero) * found.scale[found.group]
    np.testing.assert_allclose(values, read_kernel(layer, layout.shape), rtol=1e-6, atol=1e-9)


def test_awq_has_no_codes_for_others() -> None:
    _, layout = quantized("dense", Int8Scheme())
    with pytest.raises(ExportError, match=r"query: awq .*foldable: true.*--format dense"):
        kernel_codes({}, layout, AWQScheme(), "query")


def test_a_kernel_off_its_float8_grid_is_refused() -> None:
    layer, layout = quantized("dense", Float8Scheme())
    variables = {name: np.asarray(value) for name, value in own_variables(layer).items()}
    variables["kernel"] = variables["kernel"] * 1.04
    with pytest.raises(ExportError, match="dense: its kernel is not on the grid"):
        kernel_codes(variables, layout, Float8Scheme(), "dense")
