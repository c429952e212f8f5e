"""A request's identity: only what changes the result's bytes changes its run id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.catalog.entries import Gate
from jobs.catalog.request import (
    Request,
    checked_id,
    load_request,
    request_key,
    save_request,
)
from jobs.catalog.source_files import source_fingerprint
from jobs.fleet.staleness import changes
from pipeline.errors import DamagedObjectError, PipelineError, SourceError
from pipeline.executor.protocol import ComputeSpec
from pipeline.export.settings import ExportSettings
from pipeline.storage.object_store import open_store

REQUEST = Request(
    model="a",
    recipe_name="int8",
    source_url="s3://bucket/a",
    recipe={"name": "int8", "scheme": {"mode": "int8"}, "calibration": None},
    evaluation_texts=("t.txt",),
    gate=Gate(min_cosine=0.9),
    source={"config.json": "sha256:1", "model.weights.h5": "2"},
    texts={},
    evaluation={"t.txt": "3"},
    versions={"keras": "3.15.1"},
)
DECISIVE: dict[str, tuple[dict[str, Any], str]] = {
    "source": (
        {"source": {**REQUEST.source, "model.weights.h5": "9"}},
        "source changed: model.weights.h5",
    ),
    "recipe": ({"recipe": {**REQUEST.recipe, "embeddings": None}}, "recipe changed"),
    "texts": ({"texts": {"c.txt": "1"}}, "calibration changed: c.txt added"),
    "versions": ({"versions": {"keras": "3.16"}}, "versions changed: keras 3.15.1 → 3.16"),
    "threads": ({"needs": ComputeSpec(threads=3)}, "resources changed"),
}
PASSING: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"gate": Gate(min_cosine=0.8)}, "gate changed"),
    "evaluation": ({"evaluation": {"t.txt": "4"}}, "evaluation changed: t.txt"),
    "windows": ({"evaluation_windows": 9}, "evaluation changed: its settings"),
    "sets": ({"evaluation_sets": {"novels": ("n.txt",)}}, "evaluation changed: its settings"),
    "limits of a set": (
        {"gate": Gate.model_validate({"min_cosine": 0.9, "novels": {"min_cosine": 0.8}})},
        "gate changed",
    ),
    "tasks": ({"tasks": ("q.jsonl",)}, "evaluation changed: its settings"),
    "limits": ({"gate": Gate(min_cosine=0.9, max_flips=0.1)}, "gate changed"),
    "url": ({"source_url": "s3://other/a"}, "source moved"),
    "workers": ({"needs": ComputeSpec(workers=3)}, "resources changed"),
    "gpus per worker": ({"needs": ComputeSpec(gpus_per_worker=2)}, "resources changed"),
    "aliases": ({"aliases": ("b",)}, "aliases changed"),
    "keep": ({"keep": 9}, "retention changed"),
    "exports": ({"exports": (ExportSettings(),)}, "exports changed: their settings"),
    "like": (
        {"exports_like": {"s3://b/config.json": "1"}},
        "exports changed: s3://b/config.json added",
    ),
}


@pytest.mark.parametrize("change", [*DECISIVE, *PASSING])
def test_what_decides_bytes_decides_the_run(change: str) -> None:
    values, said = {**DECISIVE, **PASSING}[change]
    other = dataclasses.replace(REQUEST, **values)
    assert other.request_id != REQUEST.request_id
    assert (other.run_id != REQUEST.run_id) == (change in DECISIVE)
    assert list(changes(REQUEST, other)) == [said]
    assert list(changes(REQUEST, dataclasses.replace(REQUEST))) == []


def test_what_older_versions_did_not_know_is_not_stored_unless_it_is_asked_for() -> None:
    """Ids are digests of what is stored: releases of older versions stay fulfilled."""
    stored = REQUEST.content()
    assert not {"tasks", "exports", "exports_like"} & set(stored)
    assert stored["gate"] == {
        "max_perplexity_increase": None,
        "max_divergence": None,
        "min_cosine": 0.9,
    }
    assert REQUEST.request_id == "a-int8-28b7ffb5c437"


def test_a_request_survives_a_round_trip_and_rejects_tampering() -> None:
    root = open_store("memory://requests/round-trip")
    url = save_request(root, REQUEST)
    assert save_request(root, REQUEST) == url
    found_root, found = load_request(url)
    assert (found_root.root_url, found) == (root.root_url, REQUEST)
    data = root.get(request_key(REQUEST.request_id))
    root.put(request_key(REQUEST.request_id), data.replace(b"0.9", b"0.1"))
    with pytest.raises(DamagedObjectError):
        load_request(url)
    root.put("requests/other-0.json", data)
    with pytest.raises(PipelineError, match="holds another request"):
        load_request(f"{root.root_url}/requests/other-0.json")


@pytest.mark.parametrize("url", ["memory://x/requests/../a.json", "memory://x/requests/a", "/a"])
def test_a_url_that_is_not_a_requests_is_rejected(url: str) -> None:
    with pytest.raises(PipelineError):
        load_request(url)


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a..b", ".a", "A", "a" * 201, "a\n"])
def test_ids_cannot_traverse_paths(name: str) -> None:
    with pytest.raises(PipelineError, match="is not a run's or request's id"):
        checked_id(name)


def test_a_source_fingerprint_covers_the_model_files_and_hashes_json(tmp_path: Path) -> None:
    files = {"config.json": "{}", "model.weights.h5": "w", "assets/tokenizer/vocabulary.json": "v"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before, bytes_read = source_fingerprint(str(tmp_path))
    assert sorted(before) == sorted(files)
    assert bytes_read == 3
    undecisive = {"README.md": "prose", "pytorch_model.bin": "x", "LICENSE.txt": "a new wording"}
    for name, content in {**files, **undecisive}.items():
        (tmp_path / name).write_text(content)  # the same again, and what decides nothing
    after, _ = source_fingerprint(str(tmp_path))
    assert [n for n in before if before[n] != after[n]] == ["model.weights.h5"]
    with pytest.raises(SourceError, match=r"no config\.json"):
        source_fingerprint(str(tmp_path / "assets"))


def test_sets_and_their_limits_come_back_from_their_bytes() -> None:
    gate = Gate.model_validate({"max_divergence": 0.1, "novels": {"max_divergence_p99": 2.0}})
    given = dataclasses.replace(REQUEST, evaluation_sets={"novels": ("n.txt", "o.txt")}, gate=gate)
    assert Request.from_json(given.to_json()) == given
    assert given.content()["gate"]["novels"] == {
        "max_perplexity_increase": None,
        "max_divergence": None,
        "min_cosine": None,
        "max_divergence_p99": 2.0,
    }
    assert list(given.evaluated_on.by_name) == ["", "novels"]
