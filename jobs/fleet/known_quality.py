"""What earlier judgements say of a result's quality, so that it is not evaluated again."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.catalog.entries import Gate
from jobs.catalog.request import EVALUATED_ON, Request, request_key
from jobs.publish.releases import find_current
from jobs.publish.verdict import JudgedRun, find_verdict, judged_requests
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.fidelity import Fidelity
from pipeline.storage.object_store import ObjectStore


def known_fidelity(root: ObjectStore, request: Request, manifest_sha256: str) -> Fidelity | None:
    """A result's quality on what a request names; None if it is not known.

    Nor is it where the gate limits a figure that an older version did not measure.

    Args:
        manifest_sha256: of the result.
    """
    for judged in _judged_before(root, request):
        known = judged.manifest_sha256 == manifest_sha256 and judged.quality
        if known and _same_evaluation(root, request, judged):
            fidelity = Fidelity.from_figures(known)
            if request.gate is None or not _lacks_figures(request.gate, fidelity):
                return fidelity
    return None


def _lacks_figures(gate: Gate, fidelity: Fidelity) -> bool:
    return any(
        gate.of_set(name).max_divergence_p99 is not None
        and of_texts.divergence is not None
        and of_texts.divergence_p99 is None
        for name, of_texts in fidelity.texts.items()
    )


def _judged_before(root: ObjectStore, request: Request) -> Iterator[JudgedRun]:
    """What was judged under the request's name: for itself, what is published, for any other.

    The last matters where a gate changes before its first release.
    """
    own = find_verdict(root, request.request_id)
    if own is not None:
        yield own
    current = find_current(root, request.model, request.recipe_name)
    if current is not None:
        yield current.release
    for request_id in judged_requests(root, request.model, request.recipe_name):
        verdict = find_verdict(root, request_id)
        if verdict is not None:
            yield verdict


def _same_evaluation(root: ObjectStore, request: Request, judged: JudgedRun) -> bool:
    """Whether what was judged was evaluated on what the request names."""
    if judged.request_id == request.request_id:
        return True
    before = judged_request(root, judged)
    return before is not None and all(
        getattr(before, name) == getattr(request, name) for name in (*EVALUATED_ON, "evaluation")
    )


def judged_request(root: ObjectStore, judged: JudgedRun) -> Request | None:
    """The request that a result was judged for; None where it cannot be read."""
    try:
        return Request.read(root, request_key(judged.request_id))
    except (MissingObjectError, DamagedObjectError):
        return None
