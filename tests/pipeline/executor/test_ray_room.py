"""A machine without room for a Ray cluster is told what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.executor import ray_room
from pipeline.executor.protocol import ExecutorError
from pipeline.executor.ray_cluster import connect
from pipeline.executor.ray_room import cannot_start, usable_folder
from tests.faults.test_disk_full import small_disk


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def test_the_folder_is_where_ray_would_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/tmp")
    assert usable_folder() == Path("/tmp/ray")
    # Ray would start in the current folder.
    monkeypatch.setenv("TMPDIR", "")
    assert usable_folder() == Path("/tmp/ray")
    monkeypatch.setenv("TMPDIR", ".")
    assert usable_folder() == Path("/tmp/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    with pytest.raises(ExecutorError, match=r"^/nowhere/ray: Ray cannot keep .*No such file"):
        usable_folder()


def test_a_folder_that_cannot_be_used_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    message = r"file/ray: Ray cannot keep its sockets .*\(Not a directory\).* or set TMPDIR"
    with pytest.raises(ExecutorError, match=message) as caught, connect(None):
        pass
    assert "--address" not in str(caught.value)


def test_a_full_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 1 << 16) as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with pytest.raises(
            ExecutorError, match=r"disk/ray: .*No space left on device\); free some"
        ):
            usable_folder()


def test_a_path_too_long_for_sockets_is_refused_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("é" * 60)))
    with pytest.raises(ExecutorError, match=r"too long a path, by \d+ bytes, for the sockets"):
        usable_folder()


def test_what_is_free_is_said_where_ray_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_room, "available_memory_bytes", lambda: 85 << 20)
    said = str(cannot_start("Attempting to cap object store memory usage at 26812416 bytes."))
    assert said.startswith("Ray cannot start on this machine: Attempting to cap")
    assert "free are 85 MiB of memory, " in said
    assert "MiB in /dev/shm" in said
    assert "None" not in said
    assert "--address" not in said
