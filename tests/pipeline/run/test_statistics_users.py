"""What is taken for statistics, and so may be swept as a whole."""

from __future__ import annotations

import itertools

from pipeline.float_statistics import statistics_plan
from pipeline.plan import PLAN_KEY
from pipeline.run.statistics_users import holds_statistics, note_user, users
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.float_runs import planned_in_float

_roots = itertools.count()
DIGEST = "0123456789abcdef" * 4


def fresh(folder: str) -> ObjectStore:
    return open_store(f"memory://statistics-users/{next(_roots)}/{folder}")


def test_statistics_are_told_by_their_plan_wherever_they_are() -> None:
    run = planned_in_float("gptq").plan
    for folder in (f"statistics/{DIGEST}", f"sums/{DIGEST}"):
        store = fresh(folder)
        store.put(PLAN_KEY, statistics_plan(run).to_json())
        assert holds_statistics(store)
        store.put(PLAN_KEY, run.to_json())
        assert not holds_statistics(store)
    named = fresh("statistics/mine")
    named.put(PLAN_KEY, statistics_plan(run).to_json())
    assert not holds_statistics(named)


def test_a_capture_that_had_only_begun_is_one_and_a_user_s_own_folder_is_not() -> None:
    begun, damaged, own = (fresh(f"statistics/{DIGEST}") for _ in range(3))
    note_user(begun, "memory://elsewhere")
    assert holds_statistics(begun)
    note_user(damaged, "memory://elsewhere")
    damaged.put(PLAN_KEY, b"{")
    assert holds_statistics(damaged)
    own.put("table.csv", b"a,b")
    assert not holds_statistics(own)


def test_users_are_runs_that_are_there() -> None:
    found, run = fresh(f"statistics/{DIGEST}"), fresh("run")
    note_user(found, run.root_url)
    assert users(found) == frozenset()
    run.put(PLAN_KEY, b"a plan")
    assert users(found) == {run.root_url}
    # A note that was damaged is written again.
    [key] = found.list("users/")
    found.put(key, b"{")
    assert users(found) == frozenset()
    note_user(found, run.root_url)
    assert users(found) == {run.root_url}
