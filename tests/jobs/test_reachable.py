"""A store that a user names answers at once, or is named in a line."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from jobs.cli.main import main
from jobs.reachable import check_writable, reachable
from pipeline.errors import StorageError, StorageUrlError
from pipeline.storage.backend import PATIENCE_VARIABLE
from pipeline.storage.object_store import open_store
from tests.faults.test_disk_full import small_disk
from tests.s3 import S3Server


def test_a_store_that_answers_is_opened_with_all_patience(tmp_path) -> None:
    store = reachable(str(tmp_path), "plan.json")
    assert store.root_url == f"file://{tmp_path}"
    assert store.list() == ()


def test_a_store_that_does_not_answer_is_named_in_seconds(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("jobs.reachable._DEADLINE_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket/x/plan.json.*cannot be reached"):
        reachable("s3://bucket/x", "plan.json")
    assert time.monotonic() - start < 10
    # Whoever asked for less patience gets less.
    monkeypatch.setattr("jobs.reachable._DEADLINE_SECONDS", 600.0)
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    with pytest.raises(StorageError, match=r"1 times in \d seconds"):
        reachable("s3://bucket/x", "plan.json")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://127.0.0.1:9/runs/x", r"can only be read.* choose another output"),
        ("ftp://127.0.0.1/x", r"wants settings \(host\); use a path or s3://"),
    ],
)
def test_a_kind_of_store_that_keeps_no_runs_is_refused_without_being_asked(
    url: str, problem: str
) -> None:
    with pytest.raises(StorageUrlError, match=problem) as told:
        check_writable(open_store(url))
    assert told.value.exit_code == 2
    assert "\n" not in str(told.value)


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(tmp_path: Path) -> None:
    check_writable(open_store(str(tmp_path / "new" / "run")))
    check_writable(open_store("s3://bucket/run"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file/run: .*/file is a file, not a folder; choose"):
        check_writable(open_store(str(tmp_path / "file" / "run")))
    with small_disk(tmp_path / "disk", 1 << 16) as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StorageError, match=r"disk/a/run: .*/disk cannot be written by this"):
            check_writable(open_store(str(folder / "a" / "run")))


@pytest.mark.parametrize(
    "command",
    [
        ["status", "s3://bucket/x"],
        ["logs", "s3://bucket/x"],
        ["verify", "s3://bucket/x"],
        ["gc", "s3://bucket/x"],
        ["card", "s3://bucket/x"],
        ["report", "s3://bucket/x"],
        ["push", "s3://bucket/x", "hf://owner/name"],
        ["export", "s3://bucket/x", "--to", "s3://bucket/y", "--format", "compressed-tensors"],
        ["promote", "s3://bucket/x", "model", "recipe", "0" * 16],
        ["rollback", "s3://bucket/x", "model", "recipe"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_names_a_store_that_does_not_answer(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("jobs.reachable._DEADLINE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 3
    assert "x/plan.json: the server cannot be reached" in capsys.readouterr().err
