"""What is stored keeps its bytes: files written by version 0.1.0 are read, and made, to the byte.

`data/run` and `data/catalog` were written by that version. `data/digests.json` holds the SHA-256 of
what it made of a tiny Llama by each scheme. Products round otherwise on another kind of processor,
so the digests of calibrated runs are compared on the kind that made them alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from jobs.catalog.request import Request
from jobs.publish.releases import Current, Release
from jobs.publish.verdict import Verdict
from jobs.publish.verified_files import VerifiedFiles
from pipeline.artifact.weights_file import read_weights_file, weights_file_bytes
from pipeline.canonical import sha256
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe_file import recipe_from_dict
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import Manifest, PartRecord
from pipeline.storage.object_store import open_store
from pipeline.storage.record import StoredRecord
from pipeline.worker.worker import Worker
from tests.models.tiny import tiny_preset
from tests.pipeline.local_executor import LocalExecutor

DATA = Path(__file__).with_name("data")
DIGESTS: dict[str, dict[str, str]] = json.loads((DATA / "digests.json").read_text())
TEXT = "The quick brown fox jumps over the lazy dog, again and again and again. " * 300
MACHINE = ("AuthenticAMD", True)
"""Maker of the processor, and whether it has AVX-512, of the machine that made the digests."""

SCHEMES: dict[str, dict[str, Any]] = {
    "gptq-w2": {
        "mode": "gptq",
        "weight_bits": 2,
        "group_size": 32,
        "activation_order": True,
        "refinement_sweeps": 2,
    },
    "gptq-w3": {"mode": "gptq", "weight_bits": 3, "group_size": -1, "symmetric": True},
    "gptq-w4": {"mode": "gptq", "weight_bits": 4, "group_size": 32},
    "gptq-w8": {"mode": "gptq", "weight_bits": 8, "group_size": 16},
    "awq": {"mode": "awq", "group_size": 32},
    "float8": {"mode": "float8"},
    "int8": {"mode": "int8"},
    "int4": {"mode": "int4", "block_size": 32},
    "int4-channel": {"mode": "int4", "block_size": -1},
}
EMBEDDINGS = {
    "gptq-w4": {"mode": "int8"},
    "int8": {"mode": "int8"},
    "int4": {"mode": "int4", "block_size": 32},
}
UNCALIBRATED = ("int8", "int4", "int4-channel")


@pytest.mark.parametrize(
    ("record", "file"),
    [
        (Plan, "run/plan.json"),
        (Manifest, "run/manifest.json"),
        (PartRecord, "run/records/rest.json"),
        (PartRecord, "run/records/block-00000.json"),
        (Request, "catalog/request.json"),
        (Verdict, "catalog/verdict.json"),
        (Release, "catalog/release.json"),
        (Current, "catalog/current.json"),
        (VerifiedFiles, "catalog/verified_files.json"),
    ],
)
def test_a_stored_record_is_read_and_written_to_the_byte(
    record: type[StoredRecord], file: str
) -> None:
    data = (DATA / file).read_bytes()
    assert record.from_json(data).to_json() == data


def test_the_identities_that_a_plan_and_a_request_carry_are_kept() -> None:
    plan = Plan.from_json((DATA / "run/plan.json").read_bytes())
    manifest = Manifest.from_json((DATA / "run/manifest.json").read_bytes())
    request = Request.from_json((DATA / "catalog/request.json").read_bytes())
    release = Release.from_json((DATA / "catalog/release.json").read_bytes())
    assert plan.digest == manifest.plan_digest
    assert plan.source_digest == manifest.provenance["source_digest"]
    assert (request.run_id, request.request_id) == (release.run_id, release.request_id)


def test_a_weights_file_is_read_and_written_to_the_byte() -> None:
    data = (DATA / "run/artifact/model_00001.weights.h5").read_bytes()
    assert sha256(data) == DIGESTS["gptq-w4"]["artifact/model_00001.weights.h5"]
    assert weights_file_bytes(read_weights_file(data, max_bytes=1 << 20)) == data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden")
    (path / "english.txt").write_text(TEXT)
    tiny_preset("Llama3", path / "preset", num_blocks=2)
    return path


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What a run by a scheme leaves, by key; the plan as version 0.1.0 would have written it."""
    monkeypatch.chdir(folder)  # a plan names its source and its texts as they were given
    calibration = {"texts": ["english.txt"], "num_samples": 20, "sequence_length": 128}
    recipe = recipe_from_dict(
        {
            "name": name,
            "scheme": SCHEMES[name],
            "embeddings": EMBEDDINGS.get(name),
            "calibration": calibration,
        }
    )
    planned = make_plan(read_preset("preset"), recipe, threads=2)
    plan = as_then(planned.plan)
    store = open_store(str(folder / name))
    claim(store, plan, None if planned.windows is None else planned.windows.to_bytes())
    worker = Worker(plan, "preset", store.root_url)
    quantize(plan, store, LocalExecutor([worker]), lambda step: None)
    return {key: store.get(key) for key in store.list()}


def as_then(plan: Plan) -> Plan:
    """The plan with that version's packages and format of weights files."""
    golden = Plan.from_json((DATA / "run/plan.json").read_bytes())
    content = plan.content() | {"versions": golden.versions, "machine": golden.machine}
    content.pop("weights_format", None)
    from pipeline.storage.record import with_digest

    return Plan.from_json(with_digest(content))


def this_machine() -> tuple[str, bool]:
    cpu = Path("/proc/cpuinfo").read_text()
    return ("AuthenticAMD" if "AuthenticAMD" in cpu else "another", "avx512f" in cpu)


@pytest.mark.parametrize("name", ["int8", "gptq-w4"])
def test_a_run_leaves_the_golden_bytes(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, made(name, folder, monkeypatch))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ("int8", "gptq-w4")])
def test_a_run_of_every_scheme_leaves_the_golden_bytes(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name, made(name, folder, monkeypatch))


def check(name: str, files: dict[str, bytes]) -> None:
    golden = DIGESTS[name]
    found = {key: sha256(files[key]) for key in golden}
    # Decided by no product: the plan, and what is only rounded or copied.
    exact = ["plan.json", "artifact/model_00000.weights.h5"]
    if name in UNCALIBRATED or this_machine() == MACHINE:
        exact = list(golden)
    assert {key: found[key] for key in exact} == {key: golden[key] for key in exact}
    if name == "gptq-w4":
        same_codes(files["artifact/model_00001.weights.h5"])


def same_codes(data: bytes) -> None:
    """On any machine: nearly all codes, and all scales to rounding, are the golden ones."""
    golden = read_weights_file(
        (DATA / "run/artifact/model_00001.weights.h5").read_bytes(), max_bytes=1 << 20
    )
    found = read_weights_file(data, max_bytes=1 << 20)
    assert found.keys() == golden.keys()
    for group, arrays in golden.items():
        for ours, theirs in zip(found[group], arrays, strict=True):
            if theirs.dtype == np.uint8:
                assert np.mean(ours != theirs) < 0.01
            else:
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_stock_h5py_reads_what_it_read_then() -> None:
    with h5py.File(DATA / "run/artifact/model_00001.weights.h5") as file:
        names: list[str] = []
        file.visit(names.append)
    index = json.loads((DATA / "run/artifact/model.weights.json").read_bytes())
    groups = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2].isdecimal()}
    listed = index["weight_map"].items()
    assert groups == {
        group.strip("/") for group, file in listed if file == "model_00001.weights.h5"
    }
