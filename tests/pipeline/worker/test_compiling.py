"""GPTQ's programs are compiled ahead, once for each shape of a plan, in the order of its groups."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipeline.plan import Plan
from pipeline.run.claim import claim
from pipeline.storage.object_store import open_store
from pipeline.worker import solve as compiling
from pipeline.worker.solve import CompiledAhead
from tests.pipeline.tiny_runs import QuickWorker, model_state, planned, source


def ahead(plan: Plan) -> CompiledAhead:
    found = CompiledAhead(plan, model_state(plan.to_json(), str(source())).targets, "float32")
    found.begin()
    found.begin()  # as after shards were lost
    return found


def test_every_shape_is_compiled_once_in_the_order_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    dtypes = set()

    def note(rows: int, columns: int, scheme: Any, *, scale_dtype: str) -> None:
        shapes.append((rows, columns))
        dtypes.add(scale_dtype)

    monkeypatch.setattr(compiling, "compile_solver", note)
    plan = planned("gptq").plan
    ahead(plan).await_for(plan.parts[1].layers)
    in_turn = []
    for part in plan.parts[1:]:
        layers = {layer.name: layer for layer in part.layers}
        for group in part.groups:
            in_turn += [
                (layers[name].out_features, layers[name].in_features) for name in group.targets
            ]
    assert len(in_turn) > len(set(in_turn))
    assert shapes == list(dict.fromkeys(in_turn))
    assert dtypes == {"float32"}


def test_a_gpus_host_compiles_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(compiling.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(compiling, "compile_solver", lambda *args, **options: together.wait())
    plan = planned("gptq").plan
    ahead(plan).await_for(plan.parts[1].layers[:2])


def test_nothing_is_compiled_for_schemes_without_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_solver", lambda *args, **options: pytest.fail("called"))
    plan = planned("int8").plan
    ahead(plan).await_for(plan.parts[1].layers)


def test_a_worker_that_only_evaluates_compiles_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(compiling, "compile_solver", lambda *args, **options: called.append(args))
    store = open_store("memory://test-compiling")
    given = planned("gptq")
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    worker = QuickWorker(given.plan, str(source()), store.root_url)
    assert worker.read(1)
    assert not worker._compiled._compiling
    worker.restore(0, [0], 0)
    worker._compiled.await_for(given.plan.parts[1].layers)
    assert called


def test_compiling_runs_in_a_thread_whose_failure_reaches_the_caller_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = threading.Event()

    def fail(*args: Any, **options: Any) -> None:
        assert allowed.wait(60)
        raise MemoryError("mine")

    monkeypatch.setattr(compiling, "compile_solver", fail)
    plan = planned("gptq").plan
    started = ahead(plan)  # returns although nothing can be compiled yet
    allowed.set()
    with pytest.raises(MemoryError, match="mine"):
        started.await_for(plan.parts[1].layers)
