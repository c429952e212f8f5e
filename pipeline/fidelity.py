"""How close the result is to its source: sums over text windows, and their means.

Causal language models are compared by the perplexity of both and by the divergence
KL(source ‖ result) of their next-token distributions, other models by the cosine between their
outputs. `pipeline.worker.evaluate` computes the sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WindowFidelity:
    """Sums over one window: for a causal model all but the cosine, for an encoder that alone.

    Attributes:
        count: predicted tokens; for an encoder, compared vectors.
        source_loss, result_loss: Σ -log p(next token), natural.
        divergence: Σ KL(source ‖ result), in nats.
        agreement: tokens for which both models rank the same next token first.
        source_broken_at, result_broken_at: where values first are not finite; "" if all are.
    """

    count: int
    source_loss: float = 0.0
    result_loss: float = 0.0
    divergence: float = 0.0
    cosine: float = 0.0
    agreement: int = 0
    source_broken_at: str = ""
    result_broken_at: str = ""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Means over all windows: of a causal model all but the cosine, of an encoder that alone.

    Attributes:
        count: predicted tokens; for an encoder, compared vectors.
        divergence: nats per token.
        agreement: between 0 and 1.
        not_finite: where the result gives values that are not finite, in words; None if nowhere.
    """

    num_windows: int
    count: int
    source_perplexity: float | None = None
    result_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    not_finite: str | None = None

    def figures(self) -> dict[str, float | int | str | None]:
        """Plain JSON values.

        NaN and infinity become null, since JSON has no way to write them. What older versions do
        not know is left out where there is nothing to say.
        """
        figures = dataclasses.asdict(self)
        if self.not_finite is None:
            del figures["not_finite"]
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in figures.items()
        }


def average(windows: Sequence[WindowFidelity]) -> Fidelity:
    """Means over windows, summed in their order."""
    count = sum(window.count for window in windows)
    not_finite = _not_finite(windows)
    if not any(window.source_loss for window in windows):
        cosine = math.fsum(w.cosine for w in windows) / count
        return Fidelity(num_windows=len(windows), count=count, cosine=cosine, not_finite=not_finite)
    return Fidelity(
        num_windows=len(windows),
        count=count,
        source_perplexity=_perplexity(math.fsum(w.source_loss for w in windows) / count),
        result_perplexity=_perplexity(math.fsum(w.result_loss for w in windows) / count),
        divergence=math.fsum(w.divergence for w in windows) / count,
        agreement=sum(w.agreement for w in windows) / count,
        not_finite=not_finite,
    )


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a double."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _not_finite(windows: Sequence[WindowFidelity]) -> str | None:
    broken = [i for i, window in enumerate(windows) if window.result_broken_at]
    if not broken:
        return None
    first = windows[broken[0]]
    words = (
        f"values that are not finite in {len(broken)} of {len(windows)} windows; in window "
        f"{broken[0]} they first appear in {first.result_broken_at}"
    )
    if first.source_broken_at:
        words += f", and in the source in {first.source_broken_at}"
    return words
