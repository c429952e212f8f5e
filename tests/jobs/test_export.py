from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from pipeline.export.manifest import EXPORT_KEY
from pipeline.plan import PLAN_KEY
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.export.runs import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    source = tiny_huggingface(tmp_path_factory.mktemp("source"), "llama")
    url = str(tmp_path_factory.mktemp("run"))
    store, _ = finished_run(source, url, {"mode": "int4", "block_size": 16})
    return store


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    code: Any = stopped.value.code
    return int(code)


def test_a_dry_run_says_what_would_serve_each_layer_and_writes_nothing(
    run: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.list()
    assert command(run.root_url, "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["to"] == f"{run.root_url}/exports/compressed-tensors"
    assert (printed["format"], printed["dtype"]) == ("compressed-tensors", "bfloat16")
    rows = {row["module"]: row for row in printed["tensors"]}
    assert rows["model.layers.0.mlp.up_proj"]["stored"] == "4 bits, asymmetric, groups of 16"
    assert rows["model.layers.0.mlp.up_proj"]["kernel"] == ""
    assert run.list() == before


def test_a_table_has_a_line_for_what_all_blocks_have_in_common(
    run: ObjectStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert command(run.root_url, "--dry-run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "mlp.up_proj" in line]
    assert len(lines) == 1
    assert "model.layers.*.mlp.up_proj" in lines[0]
    assert "groups of 16: kernels for 4 bits asymmetric have groups of 32, 64, 128" in lines[0]


def test_an_export_lies_below_its_run_unless_told_otherwise(
    run: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run.root_url, "--format", "dense", "--dtype", "float32") == 0
    assert f"exports/dense/{EXPORT_KEY}" in run.list()
    assert b"library_name: transformers" in run.get("exports/dense/README.md")
    assert command(run.root_url, "--to", str(tmp_path), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == 5
    assert {EXPORT_KEY, "README.md", "eval.json"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--dtype", "int8"], 2, "--dtype int8: choose one of float32, float16, bfloat16"),
        (["--like", "/nowhere"], 2, "no config.json there"),
    ],
)
def test_what_cannot_be_exported_costs_one_line(
    run: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert command(run.root_url, *options) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_an_unfinished_run_is_refused(
    run: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(tmp_path)) == 4
    assert "name the folder that quantfleet quantize wrote to" in capsys.readouterr().err
    (tmp_path / PLAN_KEY).write_bytes(run.get(PLAN_KEY))
    assert command(str(tmp_path)) == 4
    error = capsys.readouterr().err
    assert f"{MANIFEST_KEY} is missing: the run is not finished" in error
    assert "quantfleet resume" in error
