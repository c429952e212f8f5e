"""`nightly` makes exactly what is stale and says why; a second call makes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from jobs.fleet.fleet_report import FLEET_PAGE_KEY
from jobs.fleet.nights import read_nights
from pipeline.errors import StorageError
from pipeline.executor.protocol import ExecutorError
from pipeline.plan import PLAN_KEY
from pipeline.run import lease
from pipeline.storage.object_store import open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCatalog]:
    """Two models in three recipes."""
    with tiny_catalog(tmp_path_factory.mktemp("catalog")) as catalog:
        catalog.add("alpha", ["int8", catalog.gptq()], evaluate_on=["texts/other.txt"], windows=1)
        catalog.add("beta", ["int4"])
        code, found = catalog.nightly()
        assert code == 0, catalog.err
        assert {one["result"] for one in found.values()} == {"published"}
        assert {tuple(one["reasons"]) for one in found.values()} == {("never run",)}
        yield catalog


@pytest.fixture
def made(published: TinyCatalog) -> TinyCatalog:
    """All of it up to date, as every test finds and leaves it; nothing counted yet."""
    assert done(published.nightly()[1]) == {}
    published.work.calls.clear()
    published.work.opened = 0
    return published


def done(found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The runs that were done, and why."""
    return {name: one["reasons"] for name, one in found.items() if one["result"] != "up to date"}


def test_a_second_night_makes_nothing_and_reports_what_it_read(made: TinyCatalog) -> None:
    before = {key: made.root.get(key) for key in made.root.list()}
    code, found = made.nightly()
    assert code == 0
    assert done(found) == {}
    assert made.work.solves == made.work.opened == 0
    preset = made.folder / "presets" / "alpha"
    json_bytes = sum(path.stat().st_size for path in preset.rglob("*.json"))
    assert found["alpha int8"]["bytes_read"] == json_bytes
    assert found["alpha gptq-w4"]["bytes_read"] == 0  # the source was looked at already
    assert {key: made.root.get(key) for key in made.root.list()} == before


def test_a_night_is_remembered_beside_the_fleet_s_page_and_gc_keeps_both(made: TinyCatalog) -> None:
    night = read_nights(made.root, 100)[0][0]
    assert night.num_entries == 3
    assert {(one.model, one.result, one.reasons) for one in night.entries} == {
        ("alpha", "published", ("never run",)),
        ("beta", "published", ("never run",)),
    }
    page = made.root.get(FLEET_PAGE_KEY).decode()
    for name in ("alpha", "beta"):
        run = made.current(name, "int8" if name == "alpha" else "int4")["release"]["run_id"]
        assert f'href="../runs/{run}/report.html"' in page
    before = made.root.list("report/")
    made.call("gc", made.folder / "results", "--delete")
    assert made.root.list("report/") == before
    # A dry run writes none of it.
    made.root.delete(FLEET_PAGE_KEY)
    made.nightly("--dry-run")
    assert made.root.list("report/") == tuple(key for key in before if key != FLEET_PAGE_KEY)


def test_an_outcome_outlives_the_cluster_that_its_metrics_are_for(made: TinyCatalog) -> None:
    code, found = made.nightly("--address", "127.0.0.1:1")
    assert code == 0
    assert len(found) == 3
    assert "no Ray cluster at 127.0.0.1:1" in made.err


def test_an_outcome_outlives_a_page_that_cannot_be_written(made: TinyCatalog) -> None:
    folder = made.folder / "results" / "report"
    folder.rename(folder.with_name("aside"))
    folder.write_text("no folder")
    try:
        code, found = made.nightly()
    finally:
        folder.unlink()
        folder.with_name("aside").rename(folder)
    assert code == 0
    assert len(found) == 3
    assert "no new page of the fleet could be written" in made.err


def test_a_night_of_some_models_leaves_the_page_of_all(made: TinyCatalog) -> None:
    made.values["models"].append({"name": "later", "preset": "presets/later", "recipes": ["int8"]})
    made.nightly("--only", "beta")
    made.values["models"].pop()
    assert b"later <span>int8" in made.root.get(FLEET_PAGE_KEY)
    made.nightly()
    assert b"later <span>int8" not in made.root.get(FLEET_PAGE_KEY)


def test_a_source_that_is_back_after_a_night_needs_no_hand(made: TinyCatalog) -> None:
    preset = made.folder / "presets" / "beta"
    preset.rename(preset.with_name("away"))
    assert made.nightly()[0] == 2
    assert b"Needs a hand" in made.root.get(FLEET_PAGE_KEY)
    preset.with_name("away").rename(preset)
    for _ in range(2):
        assert made.nightly()[0] == 0
        assert b"Needs a hand" not in made.root.get(FLEET_PAGE_KEY)
    (failed, back), _ = read_nights(made.root, 2)
    assert [one.result for one in (*failed.entries, *back.entries)] == ["failed", "up to date"]


def test_an_interrupted_night_leaves_what_it_made_until_then(made: TinyCatalog) -> None:
    made.values["models"].insert(0, {"name": "gone", "preset": "gone", "recipes": ["int8"]})
    made.values["models"].append(made.values["models"][-1] | {"name": "again"})
    made.work.fail = KeyboardInterrupt()
    code, _ = made.nightly()
    del made.values["models"][0], made.values["models"][-1]
    assert code == 130
    [night], _ = read_nights(made.root, 1)
    assert night.num_entries == 5
    assert [(one.model, one.result) for one in night.entries] == [("gone", "failed")]
    assert b"gone <span>int8" in made.root.get(FLEET_PAGE_KEY)
    made.nightly()


def test_a_changed_byte_in_a_source_makes_its_runs_again_and_no_others(made: TinyCatalog) -> None:
    with h5py.File(made.folder / "presets" / "beta" / "model.weights.h5", "r+") as file:
        names: list[str] = []
        file.visit(lambda name: names.append(name) if name.endswith("query_dense/vars/0") else None)
        file[names[0]][0, 0, 0] += 1.0
    reasons = ["source changed: model.weights.h5"]
    code, found = made.nightly("--dry-run", "--on", "2xcpu16")
    assert code == 0
    assert done(found) == {"beta int4": reasons}
    assert made.work.solves == 0
    # What is not to be done costs nothing.
    assert [name for name, run in found.items() if "cost" in run] == ["beta int4"]
    assert found["beta int4"]["cost"]["workers"] == 2
    assert found["beta int4"]["cost"]["price"] > 0
    before = made.current("beta", "int4"), made.current("alpha", "int8")
    assert done(made.nightly()[1]) == {"beta int4": reasons}
    assert made.work.solves == 3  # each of its parts
    number = made.current("beta", "int4")["release"]["number"]
    assert number == before[0]["release"]["number"] + 1
    assert made.current("alpha", "int8") == before[1]
    assert done(made.nightly()[1]) == {}


def test_a_named_machine_without_room_is_refused_in_a_dry_run(tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    rates.write_text("machines: {small: {like: cpu16, memory_bytes: 1000000}}")
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("beta", ["int4"])
        code, found = catalog.nightly("--dry-run", "--on", "small", "--rates", rates)
    assert code == ExecutorError.exit_code
    assert found["beta int4"]["result"] == "failed"
    assert "too little memory: a worker needs about" in found["beta int4"]["text"]


def test_what_has_no_room_is_refused_before_its_plan_is_written(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("beta", ["int4"], resources={"memory": "1MiB"})
        _, found = catalog.nightly()
        assert "too little memory: a worker needs about" in found["beta int4"]["text"]
        assert not [key for key in catalog.root.list() if key.endswith(PLAN_KEY)]


def test_a_source_written_again_unchanged_is_not_quantized_again(made: TinyCatalog) -> None:
    path = made.folder / "presets" / "alpha" / "model.weights.h5"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    before = made.current("alpha", "gptq-w4")
    code, found = made.nightly()
    assert code == 0
    assert done(found)["alpha gptq-w4"] == ["source changed: model.weights.h5"]
    assert made.work.solves == 0
    assert made.work.calls["evaluate"] == 0
    after = made.current("alpha", "gptq-w4")
    assert after["release"]["run_id"] == before["release"]["run_id"]
    assert after["release"]["request_id"] != before["release"]["request_id"]
    assert done(made.nightly()[1]) == {}


def test_a_changed_recipe_of_the_same_name_is_made(made: TinyCatalog) -> None:
    recipe = {"name": "int4", "scheme": {"mode": "int4", "block_size": 32}}
    made.values["models"][1]["recipes"][0] = recipe
    assert done(made.nightly()[1]) == {"beta int4": ["recipe changed"]}
    assert made.work.solves == 3


def test_changed_calibration_texts_are_calibrated_on(made: TinyCatalog) -> None:
    text = made.folder / "texts" / "english.txt"
    text.write_text("x" + text.read_text()[1:])
    assert done(made.nightly()[1]) == {"alpha gptq-w4": [f"calibration changed: file://{text}"]}
    assert made.work.solves > 0


def test_changed_evaluation_texts_are_evaluated_without_quantizing(made: TinyCatalog) -> None:
    text = made.folder / "texts" / "other.txt"
    text.write_text(text.read_text()[1:])
    found = done(made.nightly()[1])
    assert len(found) == 2
    assert set(map(tuple, found.values())) == {(f"evaluation changed: file://{text}",)}
    assert made.work.solves == 0
    assert made.work.calls["evaluate"] == 2


def test_changed_package_versions_are_reported(
    made: TinyCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.catalog.catalog_runs

    versions = dict(jobs.catalog.catalog_runs.package_versions())
    monkeypatch.setattr(
        jobs.catalog.catalog_runs, "package_versions", lambda: versions | {"keras": "9.9"}
    )
    _, found = made.nightly("--dry-run")
    reasons = [f"versions changed: keras {versions['keras']} → 9.9"]
    assert list(done(found).values()) == [reasons] * 3


def artifact(made: TinyCatalog, model: str, recipe: str) -> Path:
    release = made.current(model, recipe)["release"]
    return made.folder / "results" / release["artifact"]


def test_a_deleted_artifact_is_made_again_with_the_same_bytes(made: TinyCatalog) -> None:
    folder, current = artifact(made, "beta", "int4"), made.current("beta", "int4")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder.parent)
    assert done(made.nightly()[1]) == {"beta int4": ["artifact missing: manifest.json"]}
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert made.current("beta", "int4") == current
    assert done(made.nightly()[1]) == {}


@pytest.mark.parametrize("name", ["model_00002.weights.h5", "config.json", "../manifest.json"])
def test_a_damaged_artifact_is_repaired_in_place(made: TinyCatalog, name: str) -> None:
    path = (artifact(made, "alpha", "gptq-w4") / name).resolve()
    good = path.read_bytes()
    path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    key = f"artifact/{name}".replace("artifact/../", "")
    code, found = made.nightly()
    assert code == 0, made.err
    assert done(found) == {"alpha gptq-w4": [f"artifact damaged: {key}"]}
    assert found["alpha gptq-w4"]["bytes_read"] == len(good)  # no other was read
    assert path.read_bytes() == good
    assert (made.work.solves > 0) == name.endswith(".h5")
    assert made.work.calls["evaluate"] == 0
    assert done(made.nightly()[1]) == {}


def test_a_touched_artifact_is_read_again_once(made: TinyCatalog) -> None:
    path = artifact(made, "alpha", "int8") / "model_00001.weights.h5"
    os.utime(path)
    _, found = made.nightly("--dry-run")
    assert done(found) == {}
    read = found["alpha int8"]["bytes_read"]
    assert made.nightly()[1]["alpha int8"]["bytes_read"] == read
    assert made.nightly()[1]["alpha int8"]["bytes_read"] == read - path.stat().st_size


def test_a_run_held_by_another_driver_is_left_alone_and_a_failed_one_is_resumed(
    made: TinyCatalog,
) -> None:
    made.values["models"][1]["recipes"].append("int4-g64")
    _, found = made.nightly("--dry-run")
    run = open_store(f"{made.root.root_url}/runs/{found['beta int4-g64']['run_id']}")
    held = lease.acquire(run, seconds=1.0)
    code, found = made.nightly("--lease-seconds", 1)
    assert (code, found["beta int4-g64"]["result"]) == (0, "elsewhere")
    assert made.work.solves == 0
    held.release()
    # What fails is begun, and goes on in the next pass; it keeps no other from being made.
    made.values["models"].append({**made.values["models"][1], "name": "gamma", "priority": -1})
    made.work.fail = StorageError("the store is away")
    code, found = made.nightly()
    assert code == 3
    assert found["beta int4-g64"]["text"] == "the store is away"
    assert found["gamma int4-g64"]["result"] == "published"
    code, found = made.nightly()
    assert (code, done(found)) == (0, {"beta int4-g64": ["started, not finished or judged"]})


def test_a_missing_source_is_reported_and_does_not_stop_the_others(made: TinyCatalog) -> None:
    preset = made.folder / "presets" / "alpha"
    preset.rename(made.folder / "away")
    code, found = made.nightly()
    assert code == 2
    assert "presets/alpha: no config.json there" in found["alpha int8"]["text"]
    assert found["beta int4"]["result"] == "up to date"
    (made.folder / "away").rename(preset)


def test_an_alias_added_later_is_published(made: TinyCatalog) -> None:
    made.values["models"].append({"name": "stable", "alias_of": "alpha"})
    assert set(done(made.nightly()[1])) == {"alpha int8", "alpha gptq-w4"}
    assert made.work.solves == made.work.opened == 0
    assert (
        made.current("stable", "int8")["release"]["run_id"]
        == made.current("alpha", "int8")["release"]["run_id"]
    )
    assert done(made.nightly()[1]) == {}
