"""Whether a result is good enough to be published."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jobs.catalog.request import Gate
from pipeline.fidelity import Fidelity


def failures(gate: Gate | None, fidelity: Fidelity | None) -> tuple[str, ...]:
    """What a result does not keep, in words; nothing where it may be published.

    A figure that a model of this kind has not, or that is no number, keeps no limit.
    """
    return () if gate is None else tuple(_failures(gate, fidelity))


def _failures(gate: Gate, fidelity: Fidelity | None) -> Iterator[str]:
    if fidelity is None:
        yield "it was not evaluated; give evaluate_on"
        return
    if gate.max_perplexity_increase is not None:
        before, after = fidelity.source_perplexity, fidelity.result_perplexity
        if before is None or after is None:
            yield _absent("perplexity", "max_perplexity_increase", "min_cosine")
        elif not after <= before * (1 + gate.max_perplexity_increase):
            yield (
                f"perplexity {before:.4g} → {after:.4g}, {after / before - 1:+.2%}, more than "
                f"{gate.max_perplexity_increase:+.2%}"
            )
    if gate.max_divergence is not None:
        if fidelity.divergence is None:
            yield _absent("divergence", "max_divergence", "min_cosine")
        elif not fidelity.divergence <= gate.max_divergence:
            yield f"divergence {fidelity.divergence:.4g} nats, more than {gate.max_divergence:.4g}"
    if gate.min_cosine is not None:
        if fidelity.cosine is None:
            yield _absent("cosine", "min_cosine", "max_perplexity_increase or max_divergence")
        elif not fidelity.cosine >= gate.min_cosine:
            yield f"cosine {fidelity.cosine:.5f}, less than {gate.min_cosine:.5f}"


def _absent(figure: str, limit: str, instead: str) -> str:
    return f"no {figure} is measured of a model of this kind; replace {limit} by {instead}"


def figures(fidelity: Fidelity | None) -> dict[str, float | int | None] | None:
    """The quality of a result as plain JSON values; None where it was not evaluated.

    What is no finite number is null, since JSON has no other way to write it.
    """
    if fidelity is None:
        return None
    found = {
        "num_windows": fidelity.num_windows,
        "count": fidelity.count,
        "source_perplexity": fidelity.source_perplexity,
        "result_perplexity": fidelity.result_perplexity,
        "divergence": fidelity.divergence,
        "agreement": fidelity.agreement,
        "cosine": fidelity.cosine,
    }
    return {
        name: value if value is None or math.isfinite(value) else None
        for name, value in found.items()
    }
