"""`gc` lists by default, deletes on request, and never what a living driver needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.main import main
from pipeline.run.lease import acquire
from pipeline.storage.object_store import open_store
from tests.pipeline.tiny_runs import execute, lasting, planned


def gc(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, list[dict], str]:
    with pytest.raises(SystemExit) as ended:
        main(["gc", *map(str, arguments), "--json", "--lease-seconds", "1"])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(out) if out else [], err


def test_nothing_is_deleted_without_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        execute(planned("gptq"), open_store(str(tmp_path / "runs" / name)), keep_every=1)
    before = sorted(tmp_path.rglob("*"))
    status, swept, _ = gc(capsys, tmp_path)
    assert status == 0
    assert [one["url"].rpartition("/")[2] for one in swept] == ["a", "b"]
    assert all(one["garbage"] and not one["deleted"] for one in swept)
    assert sorted(tmp_path.rglob("*")) == before
    kept = lasting(open_store(str(tmp_path / "runs" / "a")))
    status, swept, _ = gc(capsys, tmp_path, "--delete")
    assert status == 0
    assert all(one["deleted"] for one in swept)
    store = open_store(str(tmp_path / "runs" / "a"))
    assert store.list("activations/") == ()
    assert lasting(store) == kept


def test_a_run_with_a_living_driver_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    execute(planned("gptq"), store, keep_every=1)
    held = acquire(store, seconds=1.0)
    before = store.list("activations/")
    assert before
    status, [one], _ = gc(capsys, tmp_path, "--delete")
    assert status == 0
    assert "is at work on this run" in one["skipped"]
    assert store.list("activations/") == before
    held.check()
    held.release()


def test_a_folder_without_runs_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = gc(capsys, tmp_path / "nothing")
    assert status == 2
    assert "no run is there" in err
