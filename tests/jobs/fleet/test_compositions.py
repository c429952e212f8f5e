"""Compositions of a catalog: made after their runs, judged, published, repaired, swept like any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.composing
import pipeline.composition.parts
import pipeline.executor.ray_jobs
from pipeline.composition.decision import Decision
from pipeline.errors import StorageError
from pipeline.plan import read_plan
from pipeline.run.records import ARTIFACT_PREFIX, MANIFEST_KEY, file_key
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.test_submission import FakeJobs
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog

BLOCKS = 2
INT4 = {"name": "int4", "scheme": {"mode": "int4", "block_size": 32}}
INT8 = {"name": "int8", "scheme": {"mode": "int8"}}
BITS = 9.3
"""A weight of these tiny blocks takes 8.26 bits in int4, scales and file included, and 10.19 in
int8."""
HALF = f"composed-{BITS}-bits"
RUNS = ["alpha int4", "alpha int8"]


def compose(bits: float = BITS, **more: Any) -> dict[str, Any]:
    return {"target_bits": bits, "measure_on": ["texts/other.txt"], "measure_windows": 2, **more}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[TinyCatalog]:
    with tiny_catalog(tmp_path) as made:
        judged = {"evaluate_on": ["texts/other.txt"], "windows": 2}
        made.add("alpha", [INT4, INT8], compose=[compose()], **judged)
        yield made


def store_of(catalog: TinyCatalog, found: dict[str, Any]) -> ObjectStore:
    return open_store(f"{catalog.root.root_url}/runs/{found['run_id']}")


def artifact(store: ObjectStore) -> dict[str, bytes]:
    keys = [*store.list(ARTIFACT_PREFIX), *store.list("records/"), MANIFEST_KEY, Decision.key]
    return {key: store.get(key) for key in keys}


def test_a_composition_is_made_judged_and_published_once_its_runs_are_there(
    catalog: TinyCatalog,
) -> None:
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert list(found) == [*RUNS, f"alpha {HALF}"]  # its runs first
    assert {one["result"] for one in found.values()} == {"published"}
    made = store_of(catalog, found[f"alpha {HALF}"])
    decision = Decision.read(made, Decision.key)
    assert set(decision.picked) == {0, 1}
    for part, picked in enumerate(decision.picked, 1):
        giver = store_of(catalog, found[RUNS[picked]])
        assert made.get(file_key(part)) == giver.get(file_key(part))
    quality = {name: one["quality"]["divergence"] for name, one in found.items()}
    assert quality["alpha int8"] < quality[f"alpha {HALF}"] < quality["alpha int4"]
    release = catalog.current("alpha", HALF)["release"]
    assert release["run_id"] == found[f"alpha {HALF}"]["run_id"]


def test_an_impossible_composition_is_told_before_its_runs_are_made(
    catalog: TinyCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.values["models"][0]["compose"] = [compose(5.0)]
    name, text = "alpha composed-5-bits", "target_bits 5.0: the smallest blocks of these recipes"
    fake = FakeJobs()
    monkeypatch.setattr(pipeline.executor.ray_jobs, "RayJobs", lambda *_, **__: fake)
    code, found = catalog.call("submit", catalog.file, "--address", "http://head:8265")
    assert code == 2, catalog.err
    assert [job["recipe"] for job in found["jobs"]] == ["int4", "int8"]
    assert [one["text"][: len(text)] for one in found["others"]] == [text]
    assert not any("composed" in job for job in fake.jobs)

    catalog.work.fail = StorageError("the store is full")
    code, found = catalog.nightly()
    assert {run: one["result"] for run, one in found.items()} == {
        "alpha int4": "failed", "alpha int8": "published", name: "failed",
    }  # fmt: skip
    assert found[name]["text"].startswith(text)
    said = catalog.err.index(f"{name.replace(' ', ' × ')}: {text}")
    assert said < catalog.err.index("alpha × int4: ")
    assert not [key for key in catalog.root.list("requests/") if "composed" in key]


@pytest.mark.exhaustive
def test_nothing_is_made_twice_and_sizes_share_what_was_measured(catalog: TinyCatalog) -> None:
    entry = catalog.values["models"][0]
    code, found = catalog.nightly("--dry-run", "--on", "1xcpu16")
    assert code == 0, catalog.err
    [*alone, foreseen] = (found[name] for name in (*RUNS, f"alpha {HALF}"))
    assert 0 < foreseen["cost"]["seconds"] < sum(one["cost"]["seconds"] for one in alone)
    int4, int8 = (one["forecast"]["stored_bytes"] for one in alone)
    assert int4 < foreseen["forecast"]["stored_bytes"] <= int8

    code, found = catalog.nightly()
    assert code == 0, catalog.err
    made = store_of(catalog, found[f"alpha {HALF}"])
    assert catalog.call("verify", made.root_url)[0] == 0
    # Nothing is made twice; another size is chosen from what was measured for the first.
    calls = dict(catalog.work.calls)
    assert {one["result"] for one in catalog.nightly()[1].values()} == {"up to date"}
    assert catalog.work.calls == calls
    entry["compose"].append(compose(8.3, name="small"))
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert found["alpha small"]["result"] == "published"
    assert catalog.work.calls["sensitivities"] == calls["sensitivities"] == BLOCKS
    assert catalog.work.calls["quantize_alone"] == calls["quantize_alone"]
    small = store_of(catalog, found["alpha small"])
    assert Decision.read(small, Decision.key).picked == (0, 0)
    rows = {row["recipe"]: row["state"] for row in catalog.call("status", catalog.file)[1]}
    assert rows == dict.fromkeys(["int4", "int8", HALF, "small"], "published")

    # Damaged at rest: found and copied again, to the same bytes.
    whole = artifact(made)
    made.put(file_key(1), b"damaged")
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert "damaged" in found[f"alpha {HALF}"]["reasons"][0]
    assert artifact(made) == whole
    assert catalog.work.calls["sensitivities"] == BLOCKS


@pytest.mark.exhaustive
def test_a_composition_is_not_tried_where_one_of_its_runs_has_failed(
    catalog: TinyCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.work.fail = StorageError("the store is full")
    code, found = catalog.nightly()
    assert code == StorageError.exit_code
    assert [one["result"] for one in found.values()] == ["failed", "published", "failed"]
    assert found[f"alpha {HALF}"]["text"] == "not composed, since alpha × int4 failed"
    assert not catalog.work.calls["sensitivities"]
    night = open_store(catalog.root.root_url).list("report/nights/")
    assert len(night) == 1

    # Interrupted while it copies, it goes on with what was decided, and measures nothing again.
    commit, count = pipeline.composition.parts.commit_part, iter(range(2))

    def once(*args: Any) -> None:
        if next(count):
            raise StorageError("the store is full")
        commit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.composition.parts, "commit_part", once)
        code, found = catalog.nightly()
    assert code == StorageError.exit_code
    assert found[f"alpha {HALF}"]["text"] == "the store is full"
    made = store_of(catalog, found[f"alpha {HALF}"])
    assert read_plan(made).composed
    assert not made.exists(MANIFEST_KEY)
    calls = dict(catalog.work.calls)
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert found[f"alpha {HALF}"]["result"] == "published"
    assert catalog.work.calls["sensitivities"] == calls["sensitivities"] == BLOCKS
    assert made.exists(MANIFEST_KEY)


@pytest.mark.exhaustive
def test_a_gate_holds_for_compositions_and_gc_takes_what_is_not_published(
    catalog: TinyCatalog,
) -> None:
    entry = catalog.values["models"][0]
    entry["gate"] = {"max_divergence": 0.003}  # of which int8 has a fifth, and the others more
    code, found = catalog.nightly()
    assert code == 5
    results = [one["result"] for one in found.values()]
    assert results == ["gate failed", "published", "gate failed"]
    assert "divergence" in found[f"alpha {HALF}"]["text"]
    calls = dict(catalog.work.calls)
    assert catalog.nightly()[0] == 5
    assert catalog.work.calls == calls

    # What failed is swept when that is asked for, with all that was measured of it.
    assert catalog.call("gc", catalog.root.root_url, "--unpublished", "--delete")[0] == 0
    runs = {key.split("/")[1] for key in catalog.root.list("runs/")}
    assert runs == {found["alpha int8"]["run_id"]}
    # A wider gate: the run is made again, since the composition takes blocks of it.
    entry["gate"] = {"max_divergence": 0.01}
    code, found = catalog.nightly()
    assert [one["result"] for one in found.values()] == ["gate failed", "published", "published"]
    assert catalog.work.calls["sensitivities"] == 2 * BLOCKS


@pytest.mark.exhaustive
def test_what_makes_a_composition_stale_is_said(catalog: TinyCatalog) -> None:
    entry = catalog.values["models"][0]
    assert catalog.nightly()[0] == 0
    for change, reason in (
        (compose(9.2, name=HALF), "target changed"),
        (compose(measure_windows=1), "measured otherwise: its settings"),
        (compose(measure_on=["texts/english.txt"]), "measured otherwise: its settings"),
    ):
        entry["compose"] = [change]
        _, found = catalog.nightly("--dry-run", "--on", "1xcpu16")
        assert found[f"alpha {HALF}"]["reasons"][0] == reason
        assert {found[name]["result"] for name in RUNS} == {"up to date"}
    entry["compose"] = [compose()]
    entry["recipes"] = [INT4 | {"rules": [{"pattern": "query", "scheme": None}]}, INT8]
    _, found = catalog.nightly("--dry-run", "--on", "1xcpu16")
    assert found[f"alpha {HALF}"]["reasons"] == ["recipes changed: int4"]
    # Files that were written again, with the same content: nothing is made.
    entry["recipes"] = [INT4, INT8]
    source = catalog.folder / "presets" / "alpha" / "model.weights.h5"
    source.write_bytes(source.read_bytes())
    calls = dict(catalog.work.calls)
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert found[f"alpha {HALF}"]["result"] == "published"
    made = {name: catalog.work.calls[name] - calls[name] for name in calls}
    assert not made["quantize_alone"]
    assert not made["sensitivities"]


@pytest.mark.exhaustive
def test_a_run_that_measures_better_is_published_in_its_place_and_that_is_said(
    catalog: TinyCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of int4, which is small enough, and of every choice.
    costs = itertools.chain([0.1], itertools.repeat(0.2))
    monkeypatch.setattr(jobs.composing, "measured_cost", lambda fidelity: next(costs))
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    composed = found[f"alpha {HALF}"]
    assert composed["result"] == "published"
    assert "the run is kept, and the output is a copy of it" in composed["text"]
    made, kept = store_of(catalog, composed), store_of(catalog, found["alpha int4"])
    for part in range(BLOCKS + 1):
        assert made.get(file_key(part)) == kept.get(file_key(part))
    assert composed["quality"] == found["alpha int4"]["quality"]
