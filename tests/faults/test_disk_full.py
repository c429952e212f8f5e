"""A full disk ends a run with one line, loses nothing, and leaves no half object."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import open_store
from tests.pipeline.tiny_runs import execute, lasting, planned


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.exhaustive
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(tmp_path: Path) -> None:
    whole = open_store("memory://disk-full/whole")
    execute(planned("gptq"), whole)
    expected = lasting(whole)
    half = sum(map(len, expected.values())) // 2
    with small_disk(tmp_path / "disk", half) as folder:
        store = open_store(str(folder))
        with pytest.raises(StorageError, match="the disk is full; free some space") as caught:
            execute(planned("gptq"), store)
        assert caught.value.exit_code == 3
        assert str(folder) in str(caught.value)
        left = lasting(store)
        assert left
        assert MANIFEST_KEY not in left
        assert left.items() <= expected.items()
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        execute(planned("gptq"), store)
        assert lasting(store) == expected
        assert store.leftovers() == ()
