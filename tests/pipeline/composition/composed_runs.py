"""A composition of finished runs, made without measuring anything."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.composition.composed_plan import (
    GivenLayers,
    GivenRun,
    composed_plan,
    parts_of_runs,
    read_given_run,
)
from pipeline.composition.parts import AssembledPart, assemble, copy_parts, seal
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.records import Manifest
from pipeline.storage.object_store import ObjectStore, open_store


def composed_run(
    runs: Sequence[ObjectStore],
    picked: Sequence[int],
    url: str,
    given_layers: Sequence[GivenLayers] = (),
) -> tuple[ObjectStore, Manifest]:
    """A finished composition; see `composed_plan`."""
    given = [read_given_run(run) for run in runs]
    store = open_store(url)
    plan = claim(store, composed_plan(given, picked, "composed", given_layers))

    def assembled(parts: Sequence[int]) -> Sequence[AssembledPart]:
        return assemble(parts_of_runs(plan, given), plan.source_url, store.root_url, parts)

    copy_parts(
        store, plan, given, assembled=assembled, check_lease=lambda: None, tell=lambda text: None
    )
    seal(store.root_url, plan.source_url)
    return store, read_manifest(store)


def every_other_group(run: GivenRun, block: int, giver: int) -> GivenLayers:
    """Of one block's inputs, the layers that read the second, the fourth, and so on.

    Args:
        run: any of those that are composed.
        giver: the number of the run that gives them.
    """
    part = run.plan.parts[block + 1]
    names = {name for group in part.groups[1::2] for name in group.targets}
    layers = tuple(layer.path for layer in part.layers if layer.name in names)
    return GivenLayers(block=block, run=giver, layers=layers)
