"""Nothing from a hostile hand is written outside its place, run, or read without measure."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from jobs.verify import verify_run
from pipeline.artifact.verification import inspect_artifact
from pipeline.canonical import sha256
from pipeline.errors import PipelineError
from pipeline.recipe.recipe_file import load_recipe
from pipeline.run.commits import read_manifest
from pipeline.run.records import FileDigest
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.tiny_runs import execute, planned

CONFIG = "artifact/config.json"
INDEX = "artifact/model.weights.json"
SHARD = "artifact/model_00001.weights.h5"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    execute(planned("int8"), open_store(str(folder)))
    return folder


@pytest.fixture
def store(honest: Path, tmp_path: Path) -> ObjectStore:
    shutil.copytree(honest, tmp_path / "run")
    return open_store(str(tmp_path / "run"))


def vouch_for(store: ObjectStore, key: str, data: bytes) -> None:
    """Put other bytes there, and a manifest that names them: consistent, and hostile."""
    store.put(key, data)
    manifest = read_manifest(store)
    entry = FileDigest(sha256=sha256(data), size_bytes=len(data))
    changed = dataclasses.replace(manifest, files={**manifest.files, key: entry})
    store.put("manifest.json", changed.to_json())


def verify(store: ObjectStore, *, stock: bool = True) -> None:
    verify_run(store.root_url, stock=stock, as_json=False)


def change_json(key: str, change: Callable[[Any], None]) -> Callable[[ObjectStore], None]:
    def spoil(store: ObjectStore) -> None:
        content = json.loads(store.get(key))
        change(content)
        vouch_for(store, key, json.dumps(content).encode())

    return spoil


def change_shard(change: Callable[[h5py.File], None]) -> Callable[[ObjectStore], None]:
    def spoil(store: ObjectStore) -> None:
        data = io.BytesIO(store.get(SHARD))
        with h5py.File(data, "r+") as file:
            change(file)
        vouch_for(store, SHARD, data.getvalue())

    return spoil


def lambda_layer(content: Any) -> None:
    content["config"]["extra"] = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"function": "import os"},
        "registered_name": None,
    }


def foreign_class(content: Any) -> None:
    content["module"], content["class_name"] = "subprocess", "Popen"


def first_dataset(file: h5py.File) -> str:
    found: list[str] = []
    file.visititems(lambda p, i: found.append(p) if isinstance(i, h5py.Dataset) else None)
    return found[0]


def bomb(file: h5py.File) -> None:
    """Two gigabytes of zeros in a few bytes."""
    path = first_dataset(file)
    del file[path]
    file.create_dataset(path, shape=(1 << 31,), dtype=np.uint8, chunks=(1 << 20,), fillvalue=0)


def external_link(file: h5py.File) -> None:
    path = first_dataset(file)
    del file[path]
    file[path] = h5py.ExternalLink("/etc/passwd", "x")


def outside(content: Any) -> None:
    for group in content["weight_map"]:
        content["weight_map"][group] = "../../../etc/passwd"


ATTACKS: dict[str, Callable[[ObjectStore], None]] = {
    "lambda": change_json(CONFIG, lambda_layer),
    "foreign class": change_json(CONFIG, foreign_class),
    "index leads outside": change_json(INDEX, outside),
    "bomb": change_shard(bomb),
    "external link": change_shard(external_link),
    "another weights file": lambda store: vouch_for(store, "artifact/model.weights.h5", b"x"),
}


def test_an_honest_artifact_passes(store: ObjectStore, honest: Path) -> None:
    inspect_artifact(honest / "artifact")
    verify(store, stock=False)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_consistent_but_hostile_artifact_is_refused_before_keras_reads_it(
    attack: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("Keras was asked")

    monkeypatch.setattr("pipeline.artifact.verification.ask_stock", never)
    ATTACKS[attack](store)
    verify(store, stock=False)
    with pytest.raises(PipelineError) as caught:
        verify(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["../outside", "artifact/../../outside", "/etc/passwd", "artifact/.hidden", "a\\b"]
)
def test_a_manifest_cannot_name_what_lies_outside(
    key: str, store: ObjectStore, tmp_path: Path
) -> None:
    manifest = read_manifest(store)
    entry = FileDigest(sha256=sha256(b"mine"), size_bytes=4)
    (tmp_path / "outside").write_bytes(b"mine")
    changed = dataclasses.replace(manifest, files={**manifest.files, key: entry})
    store.put("manifest.json", changed.to_json())
    with pytest.raises(PipelineError, match="not a storage key"):
        verify(store)
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_what_a_manifest_says_of_sizes_is_not_believed(store: ObjectStore) -> None:
    manifest = read_manifest(store)
    entry = FileDigest(sha256=sha256(b""), size_bytes=1 << 60)
    changed = dataclasses.replace(manifest, files={**manifest.files, CONFIG: entry})
    store.put("manifest.json", changed.to_json())
    with pytest.raises(PipelineError, match="are damaged"):
        verify(store, stock=False)


def test_a_record_beyond_all_measure_is_not_read(store: ObjectStore) -> None:
    with (Path(store.root_url.removeprefix("file://")) / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(PipelineError, match="more than 268435456 bytes"):
        read_manifest(store)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [true]",
        "name: !!python/name:os.system",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: *c\nscheme: {mode: int8}",
        "[" * 100_000,
        "name: x\nscheme: {mode: int8}\n" + "# padding\n" * 2_000_000,
    ],
    ids=["object", "name", "aliases", "depth", "size"],
)
def test_a_hostile_recipe_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError) as caught:
        load_recipe(str(path))
    assert len(str(caught.value)) < 600
