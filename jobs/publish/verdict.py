"""What was found when a result was judged: kept whether or not it was published.

Whether a result is good enough to be published.

What the small records of publishing have in common: strict, and with their own digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.catalog.request import Gate, checked_id
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.fidelity import Fidelity
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import StoredRecord

VERDICTS_PREFIX = "verdicts/"


@dataclass(frozen=True, kw_only=True)
class Verdict(StoredRecord):
    """Of one request. Its bytes do not depend on when or where it was reached.

    Attributes:
        request_id, model, recipe_name: what was asked for.
        run_id: of the run whose artifact was judged.
        manifest_sha256: of that artifact.
        source_bytes, stored_bytes: of the weights, before and after.
        quality: see `jobs.publish.verdict.figures`; None where nothing was measured.
        gate: the limits; None without any.
        failures: what was not kept; none, and it may be published.
    """

    request_id: str
    model: str
    recipe_name: str
    run_id: str
    plan_digest: str
    manifest_sha256: str
    source_bytes: int
    stored_bytes: int
    quality: dict[str, Any] | None
    gate: dict[str, Any] | None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


def verdict_key(request_id: str) -> str:
    """Below a catalog's root."""
    return f"{VERDICTS_PREFIX}{checked_id(request_id)}.json"


def save_verdict(root: ObjectStore, verdict: Verdict) -> None:
    """Write it, over one that was reached before."""
    root.put(verdict_key(verdict.request_id), verdict.to_json())


def find_verdict(root: ObjectStore, request_id: str) -> Verdict | None:
    """The verdict on a request; None where there is none that can be read: it is reached again."""
    try:
        return Verdict.read(root, verdict_key(request_id))
    except (MissingObjectError, DamagedObjectError):
        return None


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
