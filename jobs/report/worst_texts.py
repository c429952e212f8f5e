"""The texts that a result does worst on, as a report shows them."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.run.worst_windows import WorstWindow

LEVELS = (0.3, 1.0, 3.0)
"""Nats that a token must have lost to be marked, ever more strongly."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Some tokens in a row that lost about as much.

    Attributes:
        level: 0 for less than the least of `LEVELS`.
        most: that any of them lost, in nats.
    """

    level: int
    text: str
    most: float


@dataclass(frozen=True, kw_only=True)
class WorstText:
    """A window."""

    title: str
    figures: str
    passages: tuple[Passage, ...]


def worst_text(window: WorstWindow) -> WorstText:
    """A window as a report shows it."""
    of_set = f"{window.text_set}, " if window.text_set else ""
    from_token = f", from token {window.start}" if window.start else ""
    return WorstText(
        title=f"{of_set}window {window.number}{from_token}",
        figures=", ".join(_figures(window)),
        passages=tuple(_passages(window)),
    )


def _figures(window: WorstWindow) -> Iterator[str]:
    if window.cosine is not None:
        yield f"cosine {window.cosine:.5f}"
    if window.divergence is not None:
        yield f"KL divergence {window.divergence:.4g} nats a token"
    if window.source_perplexity is not None and window.result_perplexity is not None:
        yield f"perplexity {window.source_perplexity:.4g} → {window.result_perplexity:.4g}"


def _passages(window: WorstWindow) -> Iterator[Passage]:
    rated = (
        (sum((lost or 0.0) >= one for one in LEVELS), text, lost) for text, lost in window.text
    )
    for level, run in itertools.groupby(rated, key=lambda one: one[0]):
        tokens = list(run)
        yield Passage(
            level=level,
            text="".join(_shown(text) for _, text, _ in tokens),
            most=max(lost or 0.0 for _, _, lost in tokens),
        )


def _shown(text: str) -> str:
    """Without what has no form, or would change that of other text."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one)[0] != "C" else "\ufffd" for one in text
    )
