from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import DamagedObjectError, PlanMismatchError
from pipeline.export.checkpoint import Checkpoint, plan_checkpoint
from pipeline.export.manifest import EXPORT_KEY, ExportManifest, forget_progress
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.run.commits import read_manifest
from pipeline.run.records import file_key
from pipeline.storage import record
from pipeline.storage.object_store import ObjectStore, open_store
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.export.runs import finished_run
from tests.pipeline.presets import shared_preset
from tests.selection import by_default


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    source = tiny_huggingface(tmp_path_factory.mktemp("source"), "llama")
    store, _ = finished_run(source, str(tmp_path_factory.mktemp("run")), {"mode": "int8"})
    return store


@pytest.fixture(scope="module")
def checkpoint(run: ObjectStore) -> Checkpoint:
    artifact = read_preset(f"{run.root_url}/artifact")
    return plan_checkpoint(read_plan(run), artifact, "compressed-tensors")


Write = Callable[..., ExportManifest]


@pytest.fixture
def write(run: ObjectStore, checkpoint: Checkpoint) -> Write:
    def written(store: ObjectStore, other: Checkpoint = checkpoint) -> ExportManifest:
        made = write_checkpoint(other, run, read_manifest(run), store)
        forget_progress(store)
        return made

    return written


def everything(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list()}


def test_the_manifest_names_every_file_and_nothing_else_stays(write: Write, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    made = write(store)
    assert set(store.list()) == {*made.files, EXPORT_KEY}
    assert {key for key in made.files if key.startswith("model-")} == {
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    }
    for key, file in made.files.items():
        store.verify(key, sha256=file.sha256, size=file.size_bytes)
    assert made.num_bytes == sum(map(store.size, made.files))


def test_equal_exports_have_equal_bytes(write: Write, tmp_path: Path) -> None:
    first, second = (open_store(str(tmp_path / name)) for name in "ab")
    write(first)
    write(second)
    assert everything(first) == everything(second)


@pytest.mark.exhaustive
def test_memory_is_that_of_one_part_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file is asked for as many bytes as a record may have, and Python sets them aside.
    monkeypatch.setattr(record, "MAX_RECORD_BYTES", 1 << 20)
    peak_bytes = {}
    for num_blocks in (2, 6):
        # Blocks of 3 MB in float, beside which what grows with the number of names is small.
        source = shared_preset("Llama3", num_blocks=num_blocks, intermediate_dim=4096)
        run, manifest = finished_run(source, str(tmp_path / f"{num_blocks}"), {"mode": "int8"})
        artifact = read_preset(f"{run.root_url}/artifact")
        checkpoint = plan_checkpoint(read_plan(run), artifact, "dense")
        store = open_store(str(tmp_path / f"{num_blocks} dense"))
        tracemalloc.start()
        made = write_checkpoint(checkpoint, run, manifest, store)
        peak_bytes[num_blocks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes[6] < 1.1 * peak_bytes[2]
    assert peak_bytes[6] < made.num_bytes


class KilledError(Exception):
    """Ends an export."""


class Dying(ObjectStore):
    """A store whose writer dies at its nth write, before it or right after."""

    def __init__(self, store: ObjectStore, at: int, after: bool) -> None:
        super().__init__(store.root_url, store.backend)
        object.__setattr__(self, "left", at)
        object.__setattr__(self, "after", after)

    def create(self, key: str, data: bytes) -> None:
        object.__setattr__(self, "left", self.left - 1)
        if self.left == 0:
            if self.after:
                super().create(key, data)
            raise KilledError
        super().create(key, data)

    left: int
    after: bool


@pytest.mark.parametrize("after", by_default([False, True], [True]))
def test_an_export_killed_at_any_write_goes_on_to_the_same_bytes(
    write: Write, tmp_path: Path, after: bool
) -> None:
    whole = open_store(str(tmp_path / "whole"))
    write(whole)
    num_writes = 0
    for at in range(1, 100):
        store = open_store(str(tmp_path / f"killed-{at}"))
        try:
            write(Dying(store, at, after))
        except KilledError:
            num_writes = at
        else:
            break
        write(store)
        assert everything(store) == everything(whole)
    # The request; each part and its record; config, index; the manifest.
    assert num_writes == 1 + 3 * 2 + 2 + 1


def test_parts_that_were_written_are_not_made_again(
    write: Write, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(KilledError):
        write(Dying(store, 6, after=False))
    encoded: list[int] = []
    encode = Checkpoint.encode

    def counted(self: Checkpoint, number: int, *files: bytes | None) -> object:
        encoded.append(number)
        return encode(self, number, *files)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "encode", counted)
    write(store)
    assert encoded == [2]
    write(store)
    assert encoded == [2]


def test_a_folder_of_another_export_is_left_alone(
    write: Write, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "finished"))
    write(store)
    before = everything(store)
    dense = replace(checkpoint, format="dense", formats={})
    with pytest.raises(
        PlanMismatchError, match="with other options; delete the folder, or name another one with"
    ):
        write(store, dense)
    assert everything(store) == before
    store = open_store(str(tmp_path / "begun"))
    with pytest.raises(KilledError):
        write(Dying(store, 3, after=False))
    with pytest.raises(PlanMismatchError, match="with other options"):
        write(store, dense)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(PlanMismatchError, match=r"notes\.txt is there already, and no export"):
        write(open_store(str(tmp_path / "foreign")))


def test_a_damaged_export_is_found(write: Write, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write(store)
    file = tmp_path / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedObjectError, match=r"model-00002-of-00003.* and export again"):
        write(store)


def test_a_damaged_run_is_not_exported(
    run: ObjectStore, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    copy = open_store(str(tmp_path / "run"))
    for key, data in everything(run).items():
        copy.put(key, data[:-1] + bytes([data[-1] ^ 1]) if key == file_key(1) else data)
    with pytest.raises(DamagedObjectError, match="model_00001"):
        write_checkpoint(checkpoint, copy, read_manifest(copy), open_store(str(tmp_path / "to")))
    assert not (tmp_path / "to" / EXPORT_KEY).exists()
