"""Runs of tiny models whose blocks are solved on stored statistics of the float model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

from pipeline.float_statistics import statistics_plan, statistics_store
from pipeline.model.preset import read_preset
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.tiny_runs import CountingExecutor, execute, lasting, recipe, source


@cache
def planned_in_float(scheme: str, architecture: str = "Llama3", **changes: Any) -> Planned:
    """A plan on float statistics; `changes` are of the scheme."""
    values = recipe(scheme, statistics="float").to_dict()
    values["scheme"] |= changes
    preset = read_preset(str(source(architecture)))
    return make_plan(preset, recipe_from_dict(values), threads=2)


def sharing(given: Planned, root_url: str) -> Planned:
    """The same, with its statistics in a folder that others share."""
    return dataclasses.replace(
        given, plan=dataclasses.replace(given.plan, statistics_url=f"{root_url}/statistics")
    )


def statistics_of_run(given: Planned, store: ObjectStore) -> tuple[Planned, ObjectStore]:
    """The plan of a run's statistics, and where they are."""
    captured = dataclasses.replace(given, plan=statistics_plan(given.plan))
    return captured, statistics_store(given.plan, store.root_url)


def execute_in_float(
    given: Planned,
    store: ObjectStore,
    *,
    workers: int = 1,
    keep_every: int = 8,
    lose: Sequence[tuple[str, int]] = (),
    lose_in_capture: Sequence[tuple[str, int]] = (),
    make_executor: type[CountingExecutor] = CountingExecutor,
) -> tuple[CountingExecutor | None, CountingExecutor]:
    """Capture what is missing, then solve; a second call resumes.

    Returns:
        the executor that captured, if there was anything to capture, and the one that solved.
    """
    captured, found = statistics_of_run(given, store)
    capturing = None
    if not found.exists(MANIFEST_KEY):
        _, capturing = execute(
            captured,
            open_store(found.root_url),
            workers=workers,
            keep_every=keep_every,
            lose=lose_in_capture,
            make_executor=make_executor,
        )
    _, solving = execute(given, store, workers=workers, lose=lose, make_executor=make_executor)
    return capturing, solving


def lasting_all(store: ObjectStore) -> dict[str, bytes]:
    """As `lasting`, of the run and of its statistics, but for the names of runs that use these."""
    passing = ("/events/", "/activations/", "/quarantine/", "/leases/", "/users/")
    return {key: x for key, x in lasting(store).items() if not any(p in key for p in passing)}
