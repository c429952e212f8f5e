"""A run's directory, claimed for one plan: its plan is written, or the same one is found there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pipeline.errors import PlanMismatchError
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.plan import PLAN_KEY, Plan, read_plan
from pipeline.storage.object_store import ObjectStore


def claim(
    store: ObjectStore,
    plan: Plan,
    windows: bytes | None = None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
    others: Sequence[str] = (),
) -> Plan:
    """Write the plan into an empty run directory, or make sure that it is the one there.

    Args:
        windows: that the plan names; written first, so that a plan can always be carried out.
        beside: other objects of a new run by key, below exports/; written first too.
        others: as of `check_empty`.

    Raises:
        PlanMismatchError: the directory belongs to another plan, or holds other things.
    """
    if store.exists(PLAN_KEY):
        found = read_plan(store)
        if found.digest != plan.digest:
            raise PlanMismatchError(
                f"{store.url(PLAN_KEY)} is the plan of another run ({_difference(found, plan)}); "
                "choose another --output, or resume that run with what it was started with"
            )
        return found
    check_empty(store, others)
    if plan.tokens is not None and windows is not None:
        store.create(plan.tokens.key, windows)
    for key, data in beside.items():
        store.put(key, data)
    store.create(PLAN_KEY, plan.to_json())
    return plan


def check_empty(store: ObjectStore, others: Sequence[str] = ()) -> None:
    """Refuse a directory without a plan that holds other things than a run may find there.

    Args:
        others: prefixes of what it may find besides.

    Raises:
        PlanMismatchError: it does.
    """
    own = (
        "tokens/",
        "leases/",
        "exports/",
        "composition/",
        "users/",
        f"{STATISTICS_FOLDER}/",
        *others,
    )
    foreign = [key for key in store.list() if not key.startswith(own)]
    if foreign:
        raise PlanMismatchError(
            f"{store.url(foreign[0])} is there already, and no {PLAN_KEY} beside it; choose an "
            "empty --output"
        )


def _difference(found: Plan, wanted: Plan) -> str:
    """How two plans differ: the names of fields, and the values for machine and versions."""
    fields = ["source_digest", "recipe", "tokens"]
    if found.source_digest == wanted.source_digest:
        fields.append("parts")  # they name the weights too
    other = [f"other {name}" for name in fields if getattr(found, name) != getattr(wanted, name)]
    theirs, ours = found.machine | found.versions, wanted.machine | wanted.versions
    return "; ".join([*other, *differences(theirs, ours, "{0} {1} there, {2} here")])


def differences(planned: Mapping[str, str], now: Mapping[str, str], form: str) -> list[str]:
    """What differs between two machines and their packages; `form` takes name and both values."""
    names = [name for name in sorted({*planned, *now}) if planned.get(name) != now.get(name)]
    return [form.format(name, planned.get(name), now.get(name)) for name in names]
