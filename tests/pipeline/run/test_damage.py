"""Damage is found before anything is built on it, and is never published."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import pytest

from jobs.gc import collect
from jobs.verify import verify_run
from pipeline.errors import DamagedObjectError, SourceError
from pipeline.model.preset import read_preset
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.planning.make_plan import make_plan
from pipeline.run.claim import claim
from pipeline.run.commits import read_manifest
from pipeline.run.driver import quantize
from pipeline.run.events import Step
from pipeline.run.records import MANIFEST_KEY, file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.worker import Worker
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import execute, lasting, planned, recipe, source
from tests.selection import by_default

_fresh = iter(range(1_000_000))


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://test-damage/{next(_fresh)}")


def flip(store: ObjectStore, key: str, place: int) -> None:
    data = bytearray(store.get(key))
    data[place] ^= 1
    store.put(key, bytes(data))


@pytest.mark.parametrize("key", [PLAN_KEY, MANIFEST_KEY])
def test_a_plan_or_manifest_with_any_other_byte_is_refused(key: str, store: ObjectStore) -> None:
    execute(planned("int8"), store)
    read = read_plan if key == PLAN_KEY else read_manifest
    size = store.size(key)
    for place in range(0, size, max(1, size // 150)):
        flip(store, key, place)
        with pytest.raises(DamagedObjectError, match=key) as caught:
            read(store)
        assert caught.value.exit_code == 4
        flip(store, key, place)
    read(store)


@pytest.mark.parametrize("key", [PLAN_KEY, MANIFEST_KEY])
def test_nothing_is_changed_beside_a_damaged_plan_or_manifest(key: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    execute(planned("int8"), store)
    flip(store, key, 99)
    before = {key: store.get(key) for key in store.list()}
    if key == MANIFEST_KEY:
        with pytest.raises(DamagedObjectError):
            verify_run(str(tmp_path), stock=False, as_json=False)
    collect(str(tmp_path), delete=True, lease_seconds=1.0, as_json=False)
    found = {key: store.get(key) for key in store.list() if not key.startswith("leases/")}
    assert found == before


@pytest.mark.parametrize("part", by_default([0, 1, 2, 3], [0, 2]))
def test_a_source_that_changes_after_planning_is_refused_and_never_published(
    part: int, store: ObjectStore, tmp_path: Path
) -> None:
    preset = tmp_path / "preset"
    shutil.copytree(source(), preset)
    made = make_plan(read_preset(str(preset)), recipe("int8"), threads=2)
    claim(store, made.plan, None)
    name = "reversible_embedding" if part == 0 else f"transformer_layer_{part - 1}"
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        found: list[str] = []
        file["layers"].visititems(
            lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None
        )
        groups = sorted(group for group in file["layers"] if "decoder" in group)
        inside = "reversible_embedding/" if part == 0 else f"{groups[part - 1]}/"
        file["layers"][next(path for path in found if path.startswith(inside))][0] += 1
    executor = LocalExecutor([Worker(made.plan, str(preset), store.root_url)])
    with pytest.raises(SourceError, match="changed since the run was planned") as caught:
        quantize(made.plan, store, executor, lambda step: None)
    assert name in str(caught.value) or part == 0
    assert not store.exists(MANIFEST_KEY)
    assert not store.exists(file_key(part))


@pytest.mark.parametrize(
    "damage",
    by_default(
        ["file flipped", "file gone", "record gone", "record flipped"],
        ["file flipped", "record gone"],
    ),
)
def test_damage_during_a_run_is_repaired_in_the_same_run(damage: str, store: ObjectStore) -> None:
    whole = open_store(f"{store.root_url}-whole")
    execute(planned("gptq"), whole, keep_every=1)
    key = file_key(1) if damage.startswith("file") else record_key(1)
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)
        if step.event == "committed" and step.part == 2 and len(steps) < 9:
            if damage.endswith("gone"):
                store.delete(key)
            else:
                flip(store, key, store.size(key) // 2)

    _, executor = execute(planned("gptq"), store, keep_every=1, report=report)
    assert any(step.event == "damaged" for step in steps)
    assert executor.solved_parts()[:4] == [0, 1, 2, 3]
    assert executor.calls["finalize"] == 2
    assert lasting(store) == lasting(whole)
