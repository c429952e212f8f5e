"""What the built-in recipes were measured to cost: quality by kind of text, and time.

`measured.json` is written by `python -m tests.benchmarks.quality.recipes`, never by hand. A recipe
that is not in it was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MEASURED_FILE = Path(__file__).with_name("measured.json")
PLAINEST = "int8"
"""The recipe that times are relative to."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class MeasuredRecipe:
    """One recipe.

    Attributes:
        divergence: mean KL(source ‖ result) in nats a token, by kind of text.
        relative_seconds: of quantizing, over those of `PLAINEST`; None where either is not known.
        num_draws: of calibration windows that it is the mean over.
    """

    divergence: Mapping[str, float]
    relative_seconds: float | None
    num_draws: int

    @property
    def divergence_text(self) -> str:
        """In a few words."""
        return ", ".join(f"{value:.3g} {kind}" for kind, value in self.divergence.items())

    @property
    def time_text(self) -> str:
        """In a few words."""
        return NOT_MEASURED if self.relative_seconds is None else f"{self.relative_seconds:.2g} ×"


@cache
def measured_recipes() -> Mapping[str, MeasuredRecipe]:
    """What is known, by recipe."""
    return {name: MeasuredRecipe(**values) for name, values in _content()["recipes"].items()}


def how_measured() -> str:
    """What model, texts and windows the figures are of; "" where there are none."""
    return str(_content()["measure"])


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(MEASURED_FILE.read_text(encoding="utf-8"))
    return content
