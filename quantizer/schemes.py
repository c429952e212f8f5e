"""Schemes: the format of one layer's quantized weight, and how its codes are found.

A scheme is frozen, checked once when it is made, and round-trips through a plain dict.
Fields that Keras also has keep its meaning and default; the docs of the others say so.
This module imports neither JAX nor Keras, so that listing schemes is instant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

from quantizer.errors import SchemeError

_T = TypeVar("_T")

# What a field allows, in words and as a check.
_GROUP_SIZE = "-1 (one scale per output channel) or positive", lambda size: size == -1 or size > 0
_SHARE = "between 0 and 1", lambda share: 0 <= share <= 1


def _option(
    default: _T, doc: str, allowed: tuple[str, Callable[[_T], bool]] = ("", lambda _: True)
) -> _T:
    """A dataclass field of the default's type; `doc` is shown by `quantfleet schemes`."""
    return dataclasses.field(default=default, metadata={"doc": doc, "allowed": allowed})


class _Checked:
    """A scheme whose fields are checked once, when it is made."""

    __slots__ = ()
    mode: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value = f"{type(self).__name__}.{field.name}", getattr(self, field.name)
            expected = type(field.default)
            # bool is an int in Python: `weight_bits: true` in a user's file must not pass.
            fits = isinstance(value, (int, float) if expected is float else expected)
            if not fits or (isinstance(value, bool) and expected is not bool):
                raise SchemeError(f"{name} must be {expected.__name__}, got {value!r}")
            words, allows = field.metadata["allowed"]
            if not allows(value):
                raise SchemeError(f"{name} must be {words}, got {value}")

    @property
    def policy(self) -> str:
        """The name of Keras' dtype policy, without its source dtype."""
        return self.mode


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQScheme(_Checked):
    """Second-order weight quantization (arXiv 2210.17323), stored as stock Keras' "gptq"."""

    mode: ClassVar[str] = "gptq"

    weight_bits: int = _option(
        4, "Bits per weight: 2, 3, 4 or 8.", ("2, 3, 4 or 8", (2, 3, 4, 8).__contains__)
    )
    group_size: int = _option(
        128,
        "Input features that share one scale; -1 gives each output channel a single one.",
        _GROUP_SIZE,
    )
    symmetric: bool = _option(False, "Zero point fixed at the middle of the code range.")
    activation_order: bool = _option(
        False, "Solve the most active inputs first; groups stay those of the original order."
    )
    hessian_damping: float = _option(
        0.01, "Share of the Hessian's mean diagonal added to it; raised only if it must be.", _SHARE
    )
    correlation_shrinkage: float = _option(
        0.0,
        "With s > 0, correlations between inputs count for rows / (rows + s * inputs) of what "
        "calibration shows (not in Keras).",
        ("between 0 and 100", lambda shrinkage: 0 <= shrinkage <= 100),
    )
    scale_search: bool = _option(
        True, "Search each group's range for the least energy-weighted error (not in Keras)."
    )
    refinement_sweeps: int = _option(
        0,
        "Sweeps that revisit every solved weight, all others known (not in Keras); 2 are plenty.",
        ("between 0 and 100", range(101).__contains__),
    )
    scale_refit: bool = _option(
        False,
        "Refit scales to the codes by least squares before each sweep (not in Keras).",
    )
    drift_correction: float = _option(
        0.0,
        "Most of the drift (0 to 1) caused by quantized layers before to undo; windows held back "
        "choose how much (not in Keras).",
        _SHARE,
    )

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        if self.scale_refit and not self.refinement_sweeps:
            raise SchemeError(
                "GPTQScheme.scale_refit must be False without refinement_sweeps, before each of "
                "which scales are refitted; set refinement_sweeps to 1 or more"
            )

    @property
    def policy(self) -> str:
        return f"gptq/{self.weight_bits}/{self.group_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AWQScheme(_Checked):
    """Activation-aware 4-bit weights (arXiv 2306.00978), stored as stock Keras' "awq"."""

    mode: ClassVar[str] = "awq"

    weight_bits: int = _option(
        4, "Bits per weight: 4, the only width that Keras' awq has.", ("4", (4).__eq__)
    )
    group_size: int = _option(
        128,
        "Input features that share one scale; -1 gives each output channel a single one.",
        _GROUP_SIZE,
    )
    num_grid_points: int = _option(
        20, "Exponents tried between 0 and 1 for the input scales.", ("positive", (0).__lt__)
    )
    clip_search: bool = _option(
        True, "Search each group's range for the least energy-weighted error (not in Keras)."
    )
    foldable: bool = _option(
        False,
        "One vector of input scales for all layers of an input, where the norm or layer before can "
        "take it up, and none elsewhere: exportable to other runtimes (not in Keras).",
    )

    @property
    def policy(self) -> str:
        return f"awq/{self.weight_bits}/{self.group_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Scheme(_Checked):
    """Symmetric 8-bit weights, one scale per output channel; no calibration."""

    mode: ClassVar[str] = "int8"

    quantize_activations: bool = _option(
        True, "Quantize the layer's inputs too, at run time, as Keras does by default."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Scheme(_Checked):
    """4-bit weights rounded to nearest, weight-only; no calibration."""

    mode: ClassVar[str] = "int4"

    block_size: int = _option(
        128,
        "Inputs that share one scale and zero point; -1: one symmetric scale per output channel.",
        _GROUP_SIZE,
    )

    @property
    def policy(self) -> str:
        return f"int4/{self.block_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8Scheme(_Checked):
    """E4M3 weights and inputs under calibrated per-tensor scales (E5M2 is for gradients only)."""

    mode: ClassVar[str] = "float8"

    power_of_two: bool = _option(
        False, "Round scales up to powers of two: weights are exact in bfloat16 (not in Keras)."
    )


Scheme: TypeAlias = GPTQScheme | AWQScheme | Int8Scheme | Int4Scheme | Float8Scheme

SCHEMES: dict[str, type[Scheme]] = {
    scheme.mode: scheme for scheme in (GPTQScheme, AWQScheme, Int8Scheme, Int4Scheme, Float8Scheme)
}
"""Every scheme by the name of its Keras quantization mode."""


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The scheme as plain JSON values, its mode first."""
    values = {"mode": scheme.mode, **dataclasses.asdict(scheme)}
    for name in ("foldable", "correlation_shrinkage", "scale_refit"):
        if not values.get(name, True):
            del values[name]  # older versions did not know it
    return values


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
