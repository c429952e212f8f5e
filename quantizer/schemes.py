"""Schemes: the format of one layer's quantized weight, and how its codes are found.

A scheme is frozen, checked once when it is made, and round-trips through a plain dict.
Fields that Keras also has keep its meaning and default; the docs of the others say so.
This module imports neither JAX nor Keras, so that listing schemes is instant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

from quantizer.errors import SchemeError

_T = TypeVar("_T")


def _option(default: _T, doc: str) -> _T:
    """A dataclass field with its one-line documentation (shown by `quantfleet schemes`)."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def _check_type(scheme: str, name: str, value: object, expected: type) -> None:
    # bool is an int in Python: `weight_bits: true` in a user's file must not pass.
    fits = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if expected is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits:
        raise SchemeError(f"{scheme}.{name} must be {expected.__name__}, got {value!r}")


def _check_group_size(scheme: str, name: str, value: int) -> None:
    _check_type(scheme, name, value, int)
    if value != -1 and value < 1:
        raise SchemeError(
            f"{scheme}.{name} must be -1 (one scale per output channel) or positive, got {value}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQScheme:
    """Second-order weight quantization (arXiv 2210.17323), stored as stock Keras' "gptq"."""

    mode: ClassVar[str] = "gptq"

    weight_bits: int = _option(4, "Bits per weight: 2, 3, 4 or 8.")
    group_size: int = _option(
        128, "Input features that share one scale; -1 gives each output channel a single one."
    )
    symmetric: bool = _option(False, "Zero point fixed at the middle of the code range.")
    activation_order: bool = _option(
        False, "Solve the most active inputs first; groups stay those of the original order."
    )
    hessian_damping: float = _option(
        0.01, "Share of the Hessian's mean diagonal added to it; raised only if it must be."
    )
    scale_search: bool = _option(
        True, "Search each group's range for the least energy-weighted error (not in Keras)."
    )
    refinement_sweeps: int = _option(
        0, "Sweeps that revisit every solved weight, all others known (not in Keras); 2 are plenty."
    )
    drift_correction: float = _option(
        0.0, "Share (0 to 1) of the drift caused by quantized layers before to undo (not in Keras)."
    )

    def __post_init__(self) -> None:
        _check_type("GPTQScheme", "weight_bits", self.weight_bits, int)
        if self.weight_bits not in (2, 3, 4, 8):
            raise SchemeError(
                f"GPTQScheme.weight_bits must be 2, 3, 4 or 8, got {self.weight_bits}"
            )
        _check_group_size("GPTQScheme", "group_size", self.group_size)
        for name in ("symmetric", "activation_order", "scale_search"):
            _check_type("GPTQScheme", name, getattr(self, name), bool)
        _check_type("GPTQScheme", "refinement_sweeps", self.refinement_sweeps, int)
        if not 0 <= self.refinement_sweeps <= 100:
            raise SchemeError(
                f"GPTQScheme.refinement_sweeps must lie between 0 and 100, got "
                f"{self.refinement_sweeps}"
            )
        for name in ("hessian_damping", "drift_correction"):
            value = getattr(self, name)
            _check_type("GPTQScheme", name, value, float)
            if not 0 <= value <= 1:
                raise SchemeError(f"GPTQScheme.{name} must lie between 0 and 1, got {value}")

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return f"gptq/{self.weight_bits}/{self.group_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AWQScheme:
    """Activation-aware 4-bit weights (arXiv 2306.00978), stored as stock Keras' "awq"."""

    mode: ClassVar[str] = "awq"

    weight_bits: int = _option(4, "Bits per weight: 4, the only width that Keras' awq has.")
    group_size: int = _option(
        128, "Input features that share one scale; -1 gives each output channel a single one."
    )
    num_grid_points: int = _option(20, "Exponents tried between 0 and 1 for the input scales.")
    clip_search: bool = _option(
        True, "Search each group's range for the least energy-weighted error (not in Keras)."
    )

    def __post_init__(self) -> None:
        _check_type("AWQScheme", "weight_bits", self.weight_bits, int)
        if self.weight_bits != 4:
            raise SchemeError(f"AWQScheme.weight_bits must be 4, got {self.weight_bits}")
        _check_group_size("AWQScheme", "group_size", self.group_size)
        _check_type("AWQScheme", "num_grid_points", self.num_grid_points, int)
        if self.num_grid_points < 1:
            raise SchemeError(
                f"AWQScheme.num_grid_points must be positive, got {self.num_grid_points}"
            )
        _check_type("AWQScheme", "clip_search", self.clip_search, bool)

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return f"awq/{self.weight_bits}/{self.group_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Scheme:
    """Symmetric 8-bit weights, one scale per output channel; no calibration."""

    mode: ClassVar[str] = "int8"

    quantize_activations: bool = _option(
        True, "Quantize the layer's inputs too, at run time, as Keras does by default."
    )

    def __post_init__(self) -> None:
        _check_type("Int8Scheme", "quantize_activations", self.quantize_activations, bool)

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Scheme:
    """4-bit weights rounded to nearest, weight-only; no calibration."""

    mode: ClassVar[str] = "int4"

    block_size: int = _option(
        128,
        "Inputs that share one scale and zero point; -1: one symmetric scale per output channel.",
    )

    def __post_init__(self) -> None:
        _check_group_size("Int4Scheme", "block_size", self.block_size)

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return f"int4/{self.block_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8Scheme:
    """E4M3 weights and inputs under calibrated per-tensor scales (E5M2 is for gradients only)."""

    mode: ClassVar[str] = "float8"

    power_of_two: bool = _option(
        False, "Round scales up to powers of two: weights are exact in bfloat16 (not in Keras)."
    )

    def __post_init__(self) -> None:
        _check_type("Float8Scheme", "power_of_two", self.power_of_two, bool)

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return "float8"


Scheme: TypeAlias = GPTQScheme | AWQScheme | Int8Scheme | Int4Scheme | Float8Scheme

SCHEMES: dict[str, type[Scheme]] = {
    scheme.mode: scheme for scheme in (GPTQScheme, AWQScheme, Int8Scheme, Int4Scheme, Float8Scheme)
}
"""Every scheme by the name of its Keras quantization mode."""


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The scheme as plain JSON values, its mode first."""
    return {"mode": scheme.mode, **dataclasses.asdict(scheme)}


def scheme_from_dict(values: dict[str, Any]) -> Scheme:
    """The inverse of `scheme_to_dict`; absent fields take their defaults.

    Raises:
        SchemeError: an unknown mode, an unknown field or a bad value.
    """
    fields = dict(values)
    mode = fields.pop("mode", None)
    if not isinstance(mode, str) or mode not in SCHEMES:
        raise SchemeError(f"unknown scheme mode {mode!r}; choose one of {', '.join(SCHEMES)}")
    known = [field.name for field in dataclasses.fields(SCHEMES[mode])]
    unknown = sorted(set(fields) - set(known), key=str)
    if unknown:
        raise SchemeError(
            f"scheme {mode!r} has no field {', '.join(map(repr, unknown))}; "
            f"its fields are {', '.join(known)}"
        )
    return SCHEMES[mode](**fields)
