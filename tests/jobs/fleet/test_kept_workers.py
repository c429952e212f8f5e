"""The recipes of one model share workers, digests and token windows within a pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.known_plan
from jobs.catalog.request import run_store
from pipeline.errors import PipelineError
from pipeline.executor.ray_executor import _WorkerActor
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[TinyCatalog]:
    with tiny_catalog(tmp_path) as made:
        yield made


def digest(catalog: TinyCatalog, one: dict[str, Any]) -> str:
    return read_plan(run_store(catalog.root, one["run_id"])).digest


def test_recipes_of_a_model_share_workers_and_what_planning_read(
    catalog: TinyCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plan_on = jobs.known_plan.plan_on

    def counted(runner: Any, source_url: str, recipe: Any, threads: int) -> Any:
        read.append(recipe.name)
        return plan_on(runner, source_url, recipe, threads)

    monkeypatch.setattr(jobs.known_plan, "plan_on", counted)
    catalog.add("alpha", ["int8", catalog.gptq(4), catalog.gptq(2)])
    catalog.add("beta", ["int8"])
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert catalog.work.opened == 2
    # Of two recipes that calibrate alike the second reads nothing.
    assert read == ["int8", "gptq-w4", "int8"]
    shared = digest(catalog, found["alpha gptq-w2"])
    # The plan is what it would be alone.
    catalog.values["models"] = [catalog.values["models"][0] | {"recipes": [catalog.gptq(2)]}]
    catalog.values["root"] = "alone"
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert read[3:] == ["gptq-w2"]
    alone = open_store(str(catalog.folder / "alone"))
    assert read_plan(run_store(alone, found["alpha gptq-w2"]["run_id"])).digest == shared


def test_a_run_that_fails_takes_its_workers_with_it(catalog: TinyCatalog) -> None:
    catalog.add("alpha", ["int8", catalog.gptq(4)])
    catalog.work.fail = PipelineError("injected")
    _, found = catalog.nightly()
    assert [one["result"] for one in found.values()] == ["failed", "published"]
    assert catalog.work.opened == 2


class Held:
    """Stands for a worker."""

    def name(self) -> str:
        return "worker"


def test_what_a_worker_held_is_freed_before_it_plans_the_next_run() -> None:
    held: list[weakref.ref[Held]] = []

    def start() -> Any:
        def open_worker(*_: str) -> Held:
            worker = Held()
            held.append(weakref.ref(worker))
            return worker

        return open_worker

    actor = _WorkerActor(start, ".")
    assert actor.call("first", "name") == (None, "worker")
    assert actor.run(len, "abc", of_run="first") == (None, 3)
    assert held[0]() is not None
    assert actor.run(len, "abc", of_run="second") == (None, 3)
    gc.collect()
    assert held[0]() is None
