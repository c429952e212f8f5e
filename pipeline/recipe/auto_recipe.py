"""A recipe that names a size instead of a width: `scheme: {mode: auto, target_bits: 3.5, …}`.

It stands for several recipes that differ in nothing but the bits of a weight, and whose results one
is composed of (see `pipeline.composition`). Nothing that plans or solves ever sees it: each of the
recipes that it stands for is an ordinary one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.recipe.recipe import Calibration, EmbeddingsField, Recipe, Rule
from quantizer.errors import SchemeError
from quantizer.schemes import Float8Scheme, GPTQScheme, scheme_from_dict, scheme_to_dict

MODE = "auto"
MOST_TARGET_BITS = 1000
"""Of a weight, with room for scales and all else in the file of a tiny block."""
_WIDTHS = (2, 3, 4, 8)
ACCURATE: Mapping[str, Any] = MappingProxyType(
    {
        "activation_order": True,
        "scale_search": True,
        "refinement_sweeps": 2,
        "correlation_shrinkage": 1.0,
    }
)
"""Settings of gptq with the lowest error, on text like that of the calibration and on other text
(docs/accuracy.md); each costs time only while quantizing."""
_OWN = ("target_bits", "target_bytes", "choices", "measure_windows", "by_layers")
_DEFAULT_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class AutoScheme:
    """A gptq of which each block gets the width that serves the whole model best, within a size.

    Attributes:
        target_bits: that a weight of the blocks may take on average, as stored, with scales, zero
            points and all else in the blocks' files; None where target_bytes is given.
        target_bytes: that all weights files may take.
        choices: bits of a weight, from few to many.
        measure_windows: of calibration, on which the cost of each block's width is measured, and
            the choice beside uniform widths.
        by_layers: whether layers of one block may have different widths.
        gptq: all else of the blocks' scheme; what a recipe does not say is as in the built-in ones.
    """

    target_bits: float | None = None
    target_bytes: int | None = None
    choices: tuple[int, ...] = _WIDTHS
    measure_windows: int = _DEFAULT_WINDOWS
    by_layers: bool = True
    gptq: GPTQScheme = dataclasses.field(default_factory=GPTQScheme)

    def __post_init__(self) -> None:
        """Raises: SchemeError."""
        for name, value in (("target_bits", self.target_bits), ("target_bytes", self.target_bytes)):
            kind = int if name == "target_bytes" else int | float
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                words = "a whole number" if kind is int else "a number such as 3.5"
                raise SchemeError(f"{name} must be {words}, got {value!r}")
            if not 0 < value < math.inf:
                raise SchemeError(f"{name} must be more than 0, got {value}")
        if (self.target_bits is None) == (self.target_bytes is None):
            raise SchemeError(
                "auto needs a size: target_bits, such as 3.5, or target_bytes; and not both"
            )
        if self.target_bits is not None and self.target_bits > MOST_TARGET_BITS:
            raise SchemeError(
                f"target_bits: no weight takes {self.target_bits:g} bits; target_bytes counts bytes"
            )
        given = self.choices
        wrong = [bits for bits in given if isinstance(bits, bool) or bits not in _WIDTHS]
        if wrong:
            raise SchemeError(
                f"choices: {wrong[0]!r} is no width of gptq, and auto chooses among these alone: "
                "2, 3, 4 and 8; give layers another scheme by a rule"
            )
        if len(given) < 2 or list(given) != sorted(set(given)):
            raise SchemeError(
                f"choices must be two widths at least, from few bits to many, each once, got "
                f"{list(given)}; write [2, 3, 4, 8], say"
            )
        windows = self.measure_windows
        if type(windows) is not int or not 1 <= windows <= 10**6:
            raise SchemeError(
                f"measure_windows must be a whole number from 1 to 1000000, got {windows!r}"
            )
        if type(self.by_layers) is not bool:
            raise SchemeError(f"by_layers must be true or false, got {self.by_layers!r}")
        if self.gptq.drift_correction:
            raise SchemeError(
                "drift_correction corrects how far the quantized model's inputs are from the float "
                "model's, and auto solves every width on the float model's; leave it out"
            )

    def of_width(self, bits: int) -> GPTQScheme:
        """The scheme of one choice."""
        return dataclasses.replace(self.gptq, weight_bits=bits)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields take their defaults.

        Raises:
            SchemeError: an unknown field or a bad value.
        """
        given = {name: value for name, value in values.items() if name != "mode"}
        own = {name: given.pop(name) for name in _OWN if name in given}
        if "weight_bits" in given:
            raise SchemeError("weight_bits is what auto chooses; name widths in choices instead")
        known = [field.name for field in dataclasses.fields(GPTQScheme)]
        unknown = sorted(set(given) - set(known), key=str)
        if unknown:
            fields = (*_OWN, *(name for name in known if name != "weight_bits"))
            raise SchemeError(
                f"scheme 'auto' has no field {', '.join(map(repr, unknown))}; its fields are "
                f"{', '.join(fields)}"
            )
        if "choices" in own:
            if not isinstance(own["choices"], list | tuple):
                raise SchemeError(f"choices must be a list, got {own['choices']!r}")
            own["choices"] = tuple(own["choices"])
        bits = own.get("target_bits")
        if isinstance(bits, int) and not isinstance(bits, bool):
            own["target_bits"] = float(bits)  # 3 is 3.0
        gptq = scheme_from_dict({"mode": "gptq", **ACCURATE, **given})
        assert isinstance(gptq, GPTQScheme)
        return cls(**own, gptq=gptq)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, its mode first."""
        gptq = {name: getattr(self.gptq, name) for name in ACCURATE} | scheme_to_dict(self.gptq)
        del gptq["mode"], gptq["weight_bits"]
        return {"mode": MODE, **self._target, "choices": list(self.choices)} | (
            {"measure_windows": self.measure_windows, "by_layers": self.by_layers} | gptq
        )

    @property
    def _target(self) -> dict[str, float | int]:
        if self.target_bits is not None:
            return {"target_bits": self.target_bits}
        assert self.target_bytes is not None
        return {"target_bytes": self.target_bytes}

    @property
    def target_text(self) -> str:
        """The target, as a recipe names it."""
        [(name, value)] = self._target.items()
        return f"{name}: {value}"


def is_auto(values: object) -> bool:
    """Whether a recipe's values are those of a recipe that chooses widths."""
    scheme = values.get("scheme") if isinstance(values, dict) else None
    return isinstance(scheme, AutoScheme) or (
        isinstance(scheme, dict) and scheme.get("mode") == MODE
    )


def _read_scheme(value: object) -> AutoScheme:
    if isinstance(value, AutoScheme):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a scheme {{mode: auto, target_bits: 3.5}}")
    return AutoScheme.from_dict(value)


class AutoRecipe(BaseModel):
    """A recipe whose blocks get widths by what they cost the model; see `Recipe` for its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Those that it stands for have the width appended.
    name: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,59}$")]
    scheme: Annotated[AutoScheme, PlainValidator(_read_scheme), PlainSerializer(AutoScheme.to_dict)]
    rules: tuple[Rule, ...] = ()
    embeddings: EmbeddingsField | None = None
    calibration: Calibration
    """Always on the float model's statistics, which all widths share."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    allow_partial: StrictBool = False
    servable: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if values.get("tuning") is not None:
                raise ValueError(
                    "tuning trains each block on what the quantized blocks before it give, and "
                    "auto solves every block on the float model's statistics; leave tuning out"
                )
            if values.get("calibration") is None:
                raise ValueError("auto must see texts; add calibration: {texts: [...]}")
        # As a plain recipe writes it.
        return {k: v for k, v in values.items() if k != "tuning"} if is_auto(values) else values

    @field_validator("calibration")
    @classmethod
    def _on_float_statistics(cls, given: Calibration) -> Calibration:
        if given.statistics == "sequential" and "statistics" in given.model_fields_set:
            raise ValueError(
                "statistics: sequential runs the model anew for every width, and auto captures "
                "once for all of them; write statistics: float, or leave it out"
            )
        return given.model_copy(update={"statistics": "float"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in self.rules:
            if isinstance(rule.scheme, Float8Scheme) or (
                isinstance(rule.scheme, GPTQScheme) and rule.scheme.drift_correction
            ):
                is_gptq = isinstance(rule.scheme, GPTQScheme)
                what = "gptq with drift_correction" if is_gptq else rule.scheme.mode
                raise ValueError(
                    f"rules: {rule.pattern}: {what} needs more than the stored sums over the float "
                    "model's inputs, on which auto solves; give these layers gptq, awq, int8, int4 "
                    "or null"
                )
        try:
            _ = self.recipes
        except ValidationError as invalid:
            error = invalid.errors()[0]
            raise ValueError(str(error.get("ctx", {}).get("error", error["msg"]))) from None
        return self

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those that it stands for, one for each of its choices."""
        return tuple(
            Recipe(
                name=f"{self.name}-w{bits}",
                scheme=self.scheme.of_width(bits),
                rules=self.rules,
                embeddings=self.embeddings,
                calibration=self.calibration,
                dtype=self.dtype,
                allow_partial=self.allow_partial,
                servable=self.servable,
            )
            for bits in self.scheme.choices
        )

    @property
    def needs_calibration(self) -> bool:
        """As `Recipe.needs_calibration`."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, without what has its default in newer fields."""
        values = self.recipes[0].to_dict()
        return values | {"name": self.name, "scheme": self.scheme.to_dict()}


AnyRecipe: TypeAlias = Recipe | AutoRecipe
AutoRecipeField = Annotated[AutoRecipe, PlainSerializer(AutoRecipe.to_dict)]
