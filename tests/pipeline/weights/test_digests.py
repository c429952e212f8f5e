"""A source is named by its values, whoever reads them, and not read where that is not needed."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.weights.digests
from pipeline.errors import SourceError
from pipeline.model.preset import PresetFiles, read_preset
from pipeline.planning.make_plan import make_plan
from pipeline.remote_planning import plan_on, read_share
from pipeline.weights.digests import (
    part_digests,
    read_in_threads,
    read_side_by_side,
    shares,
    values_digest,
    variable_digest,
)
from pipeline.weights.source import open_source
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import planned, recipe, source

TABLE = "layers/reversible_embedding/vars/0"


def test_a_part_is_named_by_its_values_alone() -> None:
    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.zeros(0, np.float16)}
    bytes_of = {path: hashlib.sha256(value.tobytes()).hexdigest() for path, value in values.items()}
    expected = json.dumps(
        {"a": ["float16", [0], bytes_of["a"]], "b": ["float32", [3, 2], bytes_of["b"]]}
    )
    assert values_digest(values) == hashlib.sha256(expected.encode()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_how_a_value_lies_in_memory_makes_no_difference(dtype: str) -> None:
    given = np.random.default_rng(0).standard_normal((2, 130, 3, 140)).astype(dtype)
    for axes in itertools.permutations(range(4)):
        moved = given.transpose(axes)
        for value in (moved, moved[::2, 1:], moved.reshape(moved.shape[0], -1)[:, ::-1]):
            expected = hashlib.sha256(value.tobytes()).hexdigest()
            assert variable_digest(value) == (dtype, value.shape, expected)
    for shape in ((), (0, 3), (3, 0), (1, 1)):
        value = np.ones(shape, dtype).T
        assert variable_digest(value)[2] == hashlib.sha256(value.tobytes()).hexdigest()


class Counted:
    """A source that counts its reads, and who is at it."""

    def __init__(self) -> None:
        self.reads: list[tuple[str, ...]] = []
        self.threads: set[int] = set()
        self.meeting = threading.Barrier(2, timeout=20)

    def read(self, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
        wanted = tuple(paths)
        self.reads.append(wanted)
        self.threads.add(threading.get_ident())
        self.meeting.wait()  # for another thread
        return {path: np.full(3, int(path), np.float32) for path in wanted}


def test_threads_read_at_once_and_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.weights.digests, "_PIECE_BYTES", 100)
    counted = Counted()
    variables = [("1", 60), ("2", 60), ("3", 300), ("4", 40), ("5", 60), ("6", 99), ("7", 2)]
    found = read_in_threads(counted, variables, 2).result()
    assert sorted(counted.reads) == [("1",), ("2",), ("3",), ("4", "5"), ("6",), ("7",)]
    assert len(counted.threads) == 2
    values = {path: np.full(3, int(path), np.float32) for path, _ in variables}
    assert part_digests([variables], found) == [values_digest(values)]


def test_a_share_is_of_neighbours_and_none_is_much_larger() -> None:
    variables = [(str(i), 10 + i % 3) for i in range(100)]
    for number in (1, 3, 7):
        cut = shares(variables, number)
        assert [variable for share in cut for variable in share] == variables
        sizes = [sum(num_bytes for _, num_bytes in share) for share in cut]
        assert len(cut) == number
        assert max(sizes) - min(sizes) < 25
    assert shares([("large", 1 << 40), ("small", 1)], 8) == [[("large", 1 << 40)], [("small", 1)]]


@pytest.mark.parametrize("processes", [1, 3])
def test_a_plan_is_the_same_however_many_read_the_weights(processes: int) -> None:
    runner = LocalExecutor([object()] * processes)
    plan, windows = plan_on(runner, str(source()), recipe("gptq"), 2)
    assert plan.to_json() == planned("gptq").plan.to_json()
    assert windows == planned("gptq").windows.to_bytes()  # type: ignore[union-attr]


def test_shares_are_read_in_the_recipe_s_dtype() -> None:
    preset = read_preset(str(source())).in_dtype("bfloat16")
    paths = open_source(preset).paths[:3]
    found = read_share(str(source()), "bfloat16", [(path, 1) for path in paths], 1)
    assert {dtype for dtype, _, _ in found.values()} == {"bfloat16"}
    values = open_source(preset).read(paths)
    assert part_digests([[(path, 1) for path in paths]], found) == [values_digest(values)]


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each file that are read while the test runs."""
    found: dict[str, int] = {}
    original = PresetFiles.read

    def read(self: PresetFiles, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = original(self, name, start, stop)
        found[name] = found.get(name, 0) + len(data)
        return data

    monkeypatch.setattr(PresetFiles, "read", read)
    return found


def large_keras(folder: Path) -> Path:
    """A preset whose first table is swollen to 2 GiB, of which the disk holds nothing."""
    shutil.copytree(source(), folder)
    with h5py.File(folder / "model.weights.h5") as file:
        before, columns = file[TABLE].shape
    rows = (2 << 30) // (4 * columns)
    for name in ("config.json", "task.json"):
        text = (folder / name).read_text()
        assert f'"vocabulary_size": {before},' in text
        text = text.replace(f'"vocabulary_size": {before},', f'"vocabulary_size": {rows},')
        (folder / name).write_text(text)
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        del file[TABLE]
        _sparse(file, TABLE, (rows, columns))
    return folder


def _sparse(file: h5py.File, name: str, shape: tuple[int, ...]) -> None:
    """A dataset that takes its room in the file, and none on the disk."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, dcpl=creation)


def test_a_plan_by_metadata_reads_no_weights(tmp_path: Path, bytes_read: dict[str, int]) -> None:
    preset = read_preset(str(large_keras(tmp_path / "keras")))
    assert preset.sizes["model.weights.h5"] > 2 << 30
    plan = make_plan(preset, recipe("int8"), threads=1, read_weights=False).plan
    assert not plan.is_complete
    assert sum(part.source_bytes for part in plan.parts) > 2 << 30
    assert 0 < bytes_read["model.weights.h5"] < 4 << 20


def test_a_plan_by_metadata_reads_the_headers_of_safetensors(
    tmp_path: Path, bytes_read: dict[str, int]
) -> None:
    preset = read_preset(str(tiny_huggingface(tmp_path / "llama", "llama")))
    plan = make_plan(preset, recipe("int8"), threads=1, read_weights=False).plan
    assert not plan.is_complete
    size = preset.sizes["model.safetensors"]
    header = 8 + int.from_bytes((tmp_path / "llama/model.safetensors").read_bytes()[:8], "little")
    assert header < size / 4
    # By the source, and by each skeleton that a converter is recorded with.
    assert bytes_read["model.safetensors"] <= 3 * header
    whole = make_plan(preset, recipe("int8"), threads=1).plan
    assert whole.is_complete
    assert plan.of_source([part.source_sha256 for part in whole.parts]) == whole


def test_weights_that_are_not_finite_are_refused_by_whoever_reads_them(tmp_path: Path) -> None:
    preset = tmp_path / "preset"
    shutil.copytree(source(), preset)
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file[TABLE][0, 0] = np.nan
    runner = LocalExecutor([object()] * 2)
    with pytest.raises(SourceError, match=r"1 of .* values are NaN or infinite"):
        plan_on(runner, str(preset), recipe("int8"), 1)


class Recording:
    """A source that says by which threads it is read."""

    def __init__(self, values: dict[str, NDArray[Any]]) -> None:
        self.values = values
        self.threads: set[str] = set()
        self.reads: list[str] = []

    def read(self, paths: Iterable[str]) -> dict[str, NDArray[Any]]:
        wanted = list(paths)
        self.threads.add(threading.current_thread().name)
        self.reads += wanted
        return {path: self.values[path] for path in wanted}


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_a_part_read_by_several_threads_is_the_part(threads: int) -> None:
    values = {f"v{i}": np.full((3, i + 1), i, np.float32) for i in range(9)}
    source = Recording(values)
    sized = [(path, value.nbytes) for path, value in values.items()]
    found, digest = read_side_by_side(source, sized, threads)
    assert list(found) == list(values)
    assert all(found[path] is values[path] for path in values)
    assert digest == values_digest(values)
    assert sorted(source.reads) == sorted(values)
    assert len(source.threads) <= threads
