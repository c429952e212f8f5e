"""Calibration texts with weights, and how many of the windows each of them gives."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StrictStr,
    Tag,
    model_serializer,
)

from pipeline.recipe.yaml_document import UNION_TAG

_Name = Annotated[StrictStr, Field(min_length=1)]


class WeightedText(BaseModel):
    """A source of texts, and its share of the windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: _Name
    """A source as `Calibration.texts` names it."""
    weight: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
    """Its share is this over the sum of all weights."""
    text_field: _Name | None = None
    """Of this source, instead of the calibration's."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if self.text_field is None:
            values.pop("text_field", None)  # a dump may leave it out already
        return values


def _kind_of(value: Any) -> str:
    """What a text is read as: text unless it is a mapping, so that numbers are told of as such."""
    return _WEIGHTED if isinstance(value, dict | WeightedText) else _PLAIN


_PLAIN, _WEIGHTED = f"{UNION_TAG}plain", f"{UNION_TAG}weighted"

CalibrationText: TypeAlias = Annotated[
    Annotated[_Name, Tag(_PLAIN)] | Annotated[WeightedText, Tag(_WEIGHTED)],
    Discriminator(_kind_of),
]
"""A source by its name alone, or with its weight."""


def shares(weights: Sequence[float], number: int) -> tuple[int, ...]:
    """Divide a number of windows by weights, exactly, by the method of largest remainders.

    Each gets the whole part of number · weight / Σ weights. What is left over goes, one each, to
    those with the largest fractions; of equal ones, to the first. Weights count as their decimal
    digits say, so that 0.1, 0.2 and 0.7 of ten windows are one, two and seven.

    Args:
        weights: positive and finite.

    Returns:
        As many numbers as weights, whose sum is `number`; some may be 0.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    whole = sum(exact)
    quotas = [weight * number / whole for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for place in by_remainder[: number - sum(counts)]:
        counts[place] += 1
    return tuple(counts)


def mixed(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The order in which windows of several sources follow each other, as evenly as they can.

    Window k of the n of a source stands at (k + ½) / n of the way; of two at the same place, that
    of the first source comes first. So every calibration shard sees all sources, whatever its size
    allows.

    Returns:
        (source, number of the window in it), for every window.
    """
    places = [
        (Fraction(2 * number + 1, 2 * count), source, number)
        for source, count in enumerate(counts)
        for number in range(count)
    ]
    return [(source, number) for _, source, number in sorted(places)]
