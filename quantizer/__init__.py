"""Quantize weights of Keras layers: schemes, calibration statistics, solvers, stored formats.

hessian = quantizer.HessianSum.of(inputs)
result = quantizer.solve(weight, hessian, quantizer.GPTQScheme(weight_bits=4))
report = quantizer.quantize_layer(layer, quantizer.GPTQScheme(), hessian)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantizer.errors import (
        CalibrationError,
        LayerError,
        QuantizationError,
        SchemeError,
        UnusableStatisticsError,
        WeightError,
    )
    from quantizer.gptq.drift import DriftSum
    from quantizer.gptq.solve import row_slices
    from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum, tree_merge
    from quantizer.keras_format.layers import kernel_layout, quantize_layer, save_model
    from quantizer.result import QuantizedWeight, SolveReport, SolveResult
    from quantizer.schemes import (
        SCHEMES,
        AWQScheme,
        Float8Scheme,
        GPTQScheme,
        Int4Scheme,
        Int8Scheme,
        Scheme,
        scheme_from_dict,
        scheme_to_dict,
    )
    from quantizer.solver import solve, solve_stack

_MODULES = {
    "quantizer.gptq.drift": ("DriftSum",),
    "quantizer.errors": (
        "CalibrationError",
        "LayerError",
        "QuantizationError",
        "SchemeError",
        "UnusableStatisticsError",
        "WeightError",
    ),
    "quantizer.hessian": (
        "CalibrationStatistics",
        "HessianSum",
        "MagnitudeSum",
        "tree_merge",
    ),
    "quantizer.keras_format.layers": ("kernel_layout", "quantize_layer", "save_model"),
    "quantizer.schemes": (
        "SCHEMES",
        "AWQScheme",
        "Float8Scheme",
        "GPTQScheme",
        "Int4Scheme",
        "Int8Scheme",
        "Scheme",
        "scheme_from_dict",
        "scheme_to_dict",
    ),
    "quantizer.result": ("QuantizedWeight", "SolveReport", "SolveResult"),
    "quantizer.gptq.solve": ("row_slices",),
    "quantizer.solver": ("solve", "solve_stack"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "SCHEMES",
    "AWQScheme",
    "CalibrationError",
    "CalibrationStatistics",
    "DriftSum",
    "Float8Scheme",
    "GPTQScheme",
    "HessianSum",
    "Int4Scheme",
    "Int8Scheme",
    "LayerError",
    "MagnitudeSum",
    "QuantizationError",
    "QuantizedWeight",
    "Scheme",
    "SchemeError",
    "SolveReport",
    "SolveResult",
    "UnusableStatisticsError",
    "WeightError",
    "kernel_layout",
    "quantize_layer",
    "row_slices",
    "save_model",
    "scheme_from_dict",
    "scheme_to_dict",
    "solve",
    "solve_stack",
    "tree_merge",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: naming a scheme must not cost the import of JAX and Keras.
    if name not in _HOME:
        raise AttributeError(f"module 'quantizer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
