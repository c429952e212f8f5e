"""A composition of finished runs, made without measuring anything."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.composition.composed_plan import composed_plan, read_given_run
from pipeline.composition.parts import copy_parts, seal
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore, open_store


def composed_run(
    runs: Sequence[ObjectStore], picked: Sequence[int], url: str
) -> tuple[ObjectStore, Manifest]:
    """A finished composition; see `composed_plan`."""
    given = [read_given_run(run) for run in runs]
    store = open_store(url)
    plan = claim(store, composed_plan(given, picked, "composed"))
    by_manifest = {run.manifest.record_sha256: run for run in given}
    givers = [by_manifest[origin.manifest_sha256] for origin in plan.composed]
    copy_parts(store, plan, givers, check_lease=lambda: None, tell=lambda text: None)
    seal(store.root_url, plan.source_url)
    return store, read_manifest(store)
