"""Where activations wait is as planned, costs no copy that it need not, and decides no result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.executor.protocol import ActivationPlace
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.activation_memory import ActivationMemory
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.devices import Devices
from pipeline.worker.worker import Worker
from tests.pipeline.tiny_runs import (
    CountingExecutor,
    QuickWorker,
    lasting,
    model_state,
    planned,
    source,
)

NO_DRIVER: Any = lambda step: None  # noqa: E731 - what a driver reports is of no interest


def run(
    store: ObjectStore,
    place: ActivationPlace,
    *,
    scheme: str = "float8",
    architecture: str = "Llama3",
    lose: Sequence[tuple[str, int]] = (),
    workers: int = 1,
) -> CountingExecutor:
    given = planned(scheme, architecture)
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    url = str(source(architecture))
    executor = CountingExecutor(
        lambda: QuickWorker(given.plan, url, store.root_url), workers, lose=lose
    )
    asked: list[int] = []

    def place_of(num_workers: int) -> ActivationPlace:
        asked.append(num_workers)
        return place

    quantize(given.plan, store, executor, NO_DRIVER, keep_every=1, place=place_of)
    # Again after each loss, since fewer workers hold more each.
    assert asked == [workers] * (1 + len(lose))
    return executor


def waiting(worker: Worker) -> Iterator[jax.Array]:
    """All that a worker's windows carry from one stage to the next."""
    for batches in worker._shards._held.values():
        for batch in batches:
            yield from batch.values.values()
            yield from batch.live


@pytest.mark.parametrize(
    ("place", "kind"), [("device", jax.devices()[0].default_memory().kind), ("host", "pinned_host")]
)
def test_between_two_stages_all_of_it_is_where_it_was_planned(
    place: ActivationPlace, kind: str, tmp_path: Path
) -> None:
    given, store = planned("float8"), open_store(str(tmp_path))
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    worker = QuickWorker(given.plan, str(source()), store.root_url)
    values = worker.read(1)
    worker.restore(0, [0, 1], 0, place)
    for stage in range(2):
        found = list(waiting(worker))
        assert len(found) > 2 * (stage + 1)
        assert {array.sharding.memory_kind for array in found} == {kind}
        worker.capture(0, stage, range(2), values)


def test_what_a_block_gives_is_not_copied_where_it_stays_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[int, Any] = {}
    original = BlockProgram.run_stage

    def run_stage(self: BlockProgram, *args: Any) -> Any:
        results, live = original(self, *args)
        computed.update((id(array), array) for array in (*results, *live))
        return results, live

    monkeypatch.setattr(BlockProgram, "run_stage", run_stage)
    executor = run(open_store(str(tmp_path)), "device")
    plan = planned("float8").plan
    model = model_state(plan.to_json(), str(source()))
    worker: Any = executor._workers[0]._worker  # type: ignore[attr-defined]
    call = model.call(plan.num_blocks - 1)
    batches = [batch for shard in worker._shards._held.values() for batch in shard]
    assert batches
    for batch in batches:
        assert computed[id(batch.values[model.graph.carried(call)[0]])] is not None
        assert all(id(array) in computed for array in batch.live)


def test_no_more_than_one_micro_batch_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", awaited.append)
    memory = ActivationMemory("host", Devices.of_this_process())
    first = memory.keep([jnp.ones(3)])
    memory.keep([jnp.zeros(3)])
    assert [list(arrays) for arrays in awaited] == [[], list(first)]


def test_what_is_kept_already_is_not_copied_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as residuals, which a block's stages pass on as they are."""
    memory = ActivationMemory("host", Devices.of_this_process())
    [kept] = memory.keep([jnp.ones(3)])
    [here] = memory.fetch([kept])
    other, again = memory.keep([jnp.zeros(2), here], {id(here): kept})
    assert again is kept
    assert other.sharding.memory_kind == "pinned_host"

    given, store = planned("float8"), open_store(str(tmp_path))
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    worker = QuickWorker(given.plan, str(source()), store.root_url)
    worker.restore(0, [0], 0, "host")
    worker.capture(0, 0, range(1), worker.read(1))
    for batch in worker._shards._held[0]:
        entered = {id(array) for array in batch.values.values()}
        assert any(id(array) in entered for array in batch.live)


def test_what_comes_back_is_what_was_put_away() -> None:
    memory = ActivationMemory("host", Devices.of_this_process())
    for dtype in ("float32", "bfloat16", "int32", "bool"):
        array = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
        [found] = memory.fetch(memory.keep([array]))
        assert (found.dtype, found.sharding.memory_kind) == (array.dtype, "device")
        assert np.asarray(found).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize(
    ("scheme", "architecture"),
    [
        ("float8", "Llama3"),
        pytest.param("gptq", "Llama3", marks=pytest.mark.exhaustive),
    ],
)
def test_results_do_not_depend_on_it(scheme: str, architecture: str, tmp_path: Path) -> None:
    """Nor on a worker that dies, and restores its shards to the same place."""
    stored = []
    for name, place, lose in (
        ("device", "device", ()),
        ("host", "host", ()),
        ("lost", "host", (("capture", 7),)),
    ):
        store = open_store(str(tmp_path / name))
        run(store, place, scheme=scheme, architecture=architecture, lose=lose)  # type: ignore[arg-type]
        kept = {key: store.get(key) for key in store.list("activations/")}
        stored.append((lasting(store), kept))
    (on_device, kept), (beside, kept_beside), (of_lost, _) = stored
    assert on_device == beside == of_lost
    assert kept == kept_beside != {}
