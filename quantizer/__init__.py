"""Quantize weights of Keras layers: schemes, calibration statistics, solvers, stored formats.

hessian = quantizer.HessianSum.of(inputs)
result = quantizer.solve(weight, hessian, quantizer.GPTQScheme(weight_bits=4))
report = quantizer.quantize_layer(layer, quantizer.GPTQScheme(), hessian)
report = quantizer.quantize_model(model, quantizer.GPTQScheme(), calibration=batches)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantizer.errors import (
    CalibrationError,
    LayerError,
    QuantizationError,
    SchemeError,
    UnusableStatisticsError,
    WeightError,
)
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

if TYPE_CHECKING:
    from quantizer.gptq.drift import DriftSum, HeldBackSums, JudgedDrift
    from quantizer.gptq.solve import row_slices
    from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum, tree_merge
    from quantizer.keras_format.layers import kernel_layout, quantize_layer, save_model
    from quantizer.keras_format.quantize_model import (
        LayerResult,
        ModelReport,
        plan_model,
        quantize_model,
    )
    from quantizer.result import QuantizedWeight, SolveReport, SolveResult
    from quantizer.solver import solve, solve_stack

# Imported on first use: naming a scheme must not cost the import of NumPy, JAX and Keras.
_MODULES = {
    "gptq.drift": "DriftSum HeldBackSums JudgedDrift",
    "gptq.solve": "row_slices",
    "hessian": "CalibrationStatistics HessianSum MagnitudeSum tree_merge",
    "keras_format.layers": "kernel_layout quantize_layer save_model",
    "keras_format.quantize_model": "LayerResult ModelReport plan_model quantize_model",
    "result": "QuantizedWeight SolveReport SolveResult",
    "solver": "solve solve_stack",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "SCHEMES",
    "AWQScheme",
    "CalibrationError",
    "CalibrationStatistics",
    "DriftSum",
    "Float8Scheme",
    "GPTQScheme",
    "HeldBackSums",
    "HessianSum",
    "Int4Scheme",
    "Int8Scheme",
    "JudgedDrift",
    "LayerError",
    "LayerResult",
    "MagnitudeSum",
    "ModelReport",
    "QuantizationError",
    "QuantizedWeight",
    "Scheme",
    "SchemeError",
    "SolveReport",
    "SolveResult",
    "UnusableStatisticsError",
    "WeightError",
    "kernel_layout",
    "plan_model",
    "quantize_layer",
    "quantize_model",
    "row_slices",
    "save_model",
    "scheme_from_dict",
    "scheme_to_dict",
    "solve",
    "solve_stack",
    "tree_merge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quantizer' has no attribute {name!r}")
    return getattr(import_module(f"quantizer.{_MODULE_OF[name]}"), name)
