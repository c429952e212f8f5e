"""How close the result is to its source: sums over text windows, and their means.

Causal language models are compared by the perplexity of both and by the divergence
KL(source ‖ result) of their next-token distributions, other models by the cosine between their
outputs. `pipeline.worker.evaluate` computes the sums.
"""

from __future__ import annotations

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
    """

    count: int
    source_loss: float = 0.0
    result_loss: float = 0.0
    divergence: float = 0.0
    cosine: float = 0.0
    agreement: int = 0


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Means over all windows: of a causal model all but the cosine, of an encoder that alone.

    Attributes:
        count: predicted tokens; for an encoder, compared vectors.
        divergence: nats per token.
        agreement: between 0 and 1.
    """

    num_windows: int
    count: int
    source_perplexity: float | None = None
    result_perplexity: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    cosine: float | None = None


def average(windows: Sequence[WindowFidelity]) -> Fidelity:
    """Means over windows, summed in their order."""
    count = sum(window.count for window in windows)
    if not any(window.source_loss for window in windows):
        cosine = math.fsum(w.cosine for w in windows) / count
        return Fidelity(num_windows=len(windows), count=count, cosine=cosine)
    return Fidelity(
        num_windows=len(windows),
        count=count,
        source_perplexity=math.exp(math.fsum(w.source_loss for w in windows) / count),
        result_perplexity=math.exp(math.fsum(w.result_loss for w in windows) / count),
        divergence=math.fsum(w.divergence for w in windows) / count,
        agreement=sum(w.agreement for w in windows) / count,
    )
