"""Statistics of the float model that a catalog's runs share: which of them are there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jobs.catalog.request import Request, run_store
from pipeline.canonical import digest_of
from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.float_statistics import statistics_store
from pipeline.plan import read_plan
from pipeline.recipe.recipe import Recipe
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore


def planned_on(request: Request) -> str:
    """What decides the source's digests and the token windows of a plan, as the request tells."""
    return digest_of(
        {
            "source": request.source,
            "texts": request.texts,
            "calibration": request.recipe.get("calibration"),
            "dtype": request.recipe.get("dtype"),
        }
    )


def statistics_of(request: Request) -> str:
    """What decides the statistics of the float model, as far as the request tells."""
    return digest_of(
        {
            "planned_on": planned_on(request),
            "needs": [request.needs.threads, request.needs.device, request.needs.accelerator],
        }
    )


def are_captured(root: ObjectStore, request: Request, recipes: Iterable[Recipe]) -> bool:
    """Whether an earlier run of a request's model has captured the statistics that it would use.

    Texts are not read for it: a run says where its statistics are, and a request what decides them.

    Args:
        request: of a run that uses statistics.
        recipes: of the model, the request's own among them.
    """
    wanted = statistics_of(request)
    for recipe in recipes:
        if not recipe.uses_float_statistics:
            continue
        beside = dataclasses.replace(request, recipe_name=recipe.name, recipe=recipe.to_dict())
        if statistics_of(beside) != wanted:
            continue
        store = run_store(root, beside.run_id)
        try:
            plan = read_plan(store)
        except (MissingObjectError, DamagedObjectError):
            continue
        if not plan.uses_float_statistics:
            continue
        if statistics_store(plan, store.root_url).exists(MANIFEST_KEY):
            return True
    return False
