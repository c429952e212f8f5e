"""From what a user asks for to a claimed run: planned in a worker's process, not the driver's."""

from __future__ import annotations

from typing import Any

from pipeline.cluster import Resources, run_once
from pipeline.plan import Plan
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_from_dict
from pipeline.run import claim
from pipeline.storage import ObjectStore


def plan_run(source_url: str, recipe: Recipe, resources: Resources) -> tuple[Plan, bytes | None]:
    """The plan, and the token windows that it names, serialized.

    Raises:
        PipelineError: a source, recipe or calibration that cannot be carried out.
    """
    plan_json, windows = run_once(
        _plan, resources, source_url, recipe.to_dict(), resources.threads
    )
    return Plan.from_json(plan_json), windows


def claim_run(store: ObjectStore, plan: Plan, windows: bytes | None) -> Plan:
    """Write plan and token windows into the run's directory, or find them there.

    Raises:
        PlanMismatchError: the directory belongs to another plan, or holds other things.
    """
    claimed = claim(store, plan)
    if plan.tokens is not None and windows is not None:
        store.create(plan.tokens.key, windows)
    return claimed


def _plan(source_url: str, recipe: dict[str, Any], threads: int) -> tuple[bytes, bytes | None]:
    # Here, so that the driver, which imports this module, imports neither JAX nor Keras.
    from pipeline.planning import make_plan
    from pipeline.preset import read_preset

    planned = make_plan(read_preset(source_url), recipe_from_dict(recipe), threads=threads)
    windows = planned.windows
    return planned.plan.to_json(), None if windows is None else windows.to_bytes()
