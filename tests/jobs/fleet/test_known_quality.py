"""A result is not evaluated again for another gate, unless that asks for more than is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs.catalog.entries import Gate
from jobs.catalog.request import save_request
from jobs.fleet.known_quality import known_fidelity
from jobs.publish.verdict import Verdict, save_verdict
from pipeline.fidelity import Fidelity
from pipeline.storage.object_store import open_store
from tests.jobs.catalog.test_request import REQUEST

MANIFEST = "ab" * 32
OF_OLDER_VERSION = Fidelity(
    num_windows=2, count=9, source_perplexity=20.0, result_perplexity=21.0, divergence=0.02,
    agreement=0.9,
)  # fmt: skip
WHOLE = dataclasses.replace(OF_OLDER_VERSION, divergence_p99=0.3)
ENCODER = Fidelity(num_windows=2, count=9, cosine=0.99)


@pytest.mark.parametrize(
    ("gate", "judged", "is_known"),
    [
        (Gate(max_divergence=0.1), OF_OLDER_VERSION, True),
        (Gate(max_divergence_p99=1.0), OF_OLDER_VERSION, False),
        (Gate(max_divergence_p99=1.0), WHOLE, True),
        (Gate(max_divergence_p99=1.0), ENCODER, True),  # it never has one, and fails for that
    ],
)
def test_what_an_older_version_did_not_measure_is_not_known(
    tmp_path: Path, gate: Gate, judged: Fidelity, is_known: bool
) -> None:
    root = open_store(str(tmp_path))
    save_request(root, REQUEST)
    save_verdict(root, verdict(judged))
    request = dataclasses.replace(REQUEST, gate=gate)
    assert known_fidelity(root, request, MANIFEST) == (judged if is_known else None)
    assert known_fidelity(root, request, "cd" * 32) is None


def verdict(fidelity: Fidelity) -> Verdict:
    return Verdict(
        request_id=REQUEST.request_id,
        model=REQUEST.model,
        recipe_name=REQUEST.recipe_name,
        run_id=REQUEST.run_id,
        plan_digest="ef" * 32,
        manifest_sha256=MANIFEST,
        source_bytes=2,
        stored_bytes=1,
        quality=fidelity.figures(),
        gate=None,
    )
