"""What was found when a result was judged: kept whether or not it was published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.catalog.request import checked_id
from jobs.publishing.written import Written
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.self_checked import read_as, read_self_checked
from pipeline.storage.object_store import ObjectStore

VERDICTS_PREFIX = "verdicts/"


@dataclass(frozen=True, kw_only=True)
class Verdict(Written):
    """Of one request. Its bytes do not depend on when or where it was reached.

    Attributes:
        request_id, model, recipe_name: what was asked for.
        run_id: of the run whose artifact was judged.
        manifest_sha256: of that artifact.
        source_bytes, stored_bytes: of the weights, before and after.
        quality: see `jobs.publishing.gate.figures`; None where nothing was measured.
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
        return read_self_checked(root, verdict_key(request_id), partial(read_as, Verdict))
    except (MissingObjectError, DamagedObjectError):
        return None
