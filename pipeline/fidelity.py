"""How far the result is from its source: what is summed over text, and what is made of the sums.

A causal language model is judged by perplexity before and after, and by the divergence
KL(source ‖ result) of its next-token distributions; any other model by the cosine between what
both answer. Plain data: `pipeline.worker.evaluate` does the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WindowFidelity:
    """CalibrationStatistics over one window.

    Attributes:
        count: predicted tokens; of an encoder, compared vectors.
        source_loss, result_loss: Σ -log p(next token), natural; 0 of an encoder.
        divergence: Σ KL(source ‖ result), in nats; 0 of an encoder.
        cosine: Σ of cosines; 0 of a causal model.
        agreement: tokens for which both find the same next one likeliest.
    """

    count: int
    source_loss: float = 0.0
    result_loss: float = 0.0
    divergence: float = 0.0
    cosine: float = 0.0
    agreement: int = 0


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Means over all windows.

    Attributes:
        num_windows, count: windows, and what was compared in them.
        source_perplexity, result_perplexity, divergence, agreement: of a causal model; the
            divergence in nats a token, the agreement a share of 1.
        cosine: of an encoder: mean cosine between source and result.
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
    if any(window.source_loss for window in windows):
        return Fidelity(
            num_windows=len(windows),
            count=count,
            source_perplexity=math.exp(math.fsum(w.source_loss for w in windows) / count),
            result_perplexity=math.exp(math.fsum(w.result_loss for w in windows) / count),
            divergence=math.fsum(w.divergence for w in windows) / count,
            agreement=sum(w.agreement for w in windows) / count,
        )
    cosine = math.fsum(w.cosine for w in windows) / count
    return Fidelity(num_windows=len(windows), count=count, cosine=cosine)
