"""Exports asked for with a run: refused before it, made after it, and finished by its resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import jobs.quantize
from jobs.cli.main import main
from jobs.run_exports import want_exports
from pipeline.errors import ExportError, PipelineError
from pipeline.export.manifest import EXPORT_KEY
from pipeline.export.settings import ExportSettings
from pipeline.plan import PLAN_KEY
from pipeline.run.commits import read_manifest
from pipeline.run.evaluations import Evaluation
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.tiny_catalog import CountingCompute
from tests.pipeline.tiny_runs import source, text_file
from tests.selection import by_default

Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command of quantfleet, whose runs are made in this process."""
    monkeypatch.setattr(jobs.quantize, "open_compute", CountingCompute().open_compute)

    def called(*arguments: str | Path) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        code: Any = stopped.value.code
        return int(code)

    return called


def recipe(folder: Path, **changes: Any) -> Path:
    values = {
        "name": "small",
        "scheme": {"mode": "gptq", "weight_bits": 4, "group_size": 32, "symmetric": True},
        "calibration": {"texts": [str(text_file())], "num_samples": 2, "sequence_length": 32},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def model(architecture: str = "Llama3") -> Path:
    # A Hugging Face GPT-2 that KerasHub reads is four times as wide inside.
    options = {"intermediate_dim": 256} if architecture == "GPT2" else {}
    return source(architecture, num_blocks=2, **options)


def exported(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list("exports/")}


AWQ = {"mode": "awq", "group_size": 32}
RAGGED = {"mode": "gptq", "weight_bits": 4, "group_size": 48}


@pytest.mark.parametrize(
    ("architecture", "scheme", "message"),
    [
        ("Llama3", AWQ, "query: awq"),
        ("Llama3", RAGGED, "64 inputs are not divisible into groups of 48"),
        ("GPT2", {"mode": "int4", "block_size": 16}, "in a Conv1D"),
        ("Bloom", {"mode": "int8"}, "KerasHub writes no config.json for a BloomBackbone"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_weight_is_read(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    scheme: dict[str, Any],
    message: str,
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the plan digests all weights")

    monkeypatch.setattr("jobs.quantize.plan_on", read)
    given = ("--recipe", recipe(tmp_path, scheme=scheme), "--output", tmp_path / "out")
    assert command("quantize", model(architecture), *given, "--export", "compressed-tensors") == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("quantfleet: ")]
    assert message in line
    assert "--export " in line or "--like" in line
    assert "--format" not in line
    assert not (tmp_path / "out").exists()


def test_input_scales_that_cannot_be_folded_are_refused_before_the_run(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_place(*_: Any) -> None:
        raise ExportError("no place for it")

    monkeypatch.setattr("pipeline.export.checkpoint.folds_of", without_place)
    given = ("--recipe", recipe(tmp_path, scheme=AWQ | {"foldable": True}))
    export = ("--export", "compressed-tensors", "--output", tmp_path / "out")
    assert command("quantize", model(), *given, *export) == 2
    assert "no place for it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_serve_each_layer(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--recipe", recipe(tmp_path), "--output", tmp_path / "out", "--dry-run")
    assert command("quantize", model(), *given, "--export", "gptq", "--json") == 0
    [found] = json.loads(capsys.readouterr().out)["exports"]
    rows = {row["module"]: row for row in found["tensors"]}
    assert rows["model.layers.1.mlp.up_proj"]["stored"] == "4 bits, symmetric, groups of 32"
    assert rows["model.layers.1.mlp.up_proj"]["kernel"] == "Marlin"
    assert command("quantize", model(), *given, "--export", "gptq") == 0
    assert "model.layers.*.mlp.up_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_without_an_export_has_one_line_about_it(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--output", tmp_path / "out", "--dry-run")
    assert command("quantize", model(), "--recipe", recipe(tmp_path), *given, "--json") == 0
    assert "compressed-tensors: Marlin (14)" in json.loads(capsys.readouterr().out)["export"]
    command("quantize", model(), "--recipe", recipe(tmp_path, scheme=AWQ), *given)
    assert "could not be exported as compressed-tensors: " in capsys.readouterr().err


def test_a_recipe_for_serving_warns_before_it_runs(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def claim(*_: Any, **__: Any) -> None:
        raise PipelineError("nothing was made yet")

    monkeypatch.setattr("jobs.quantize.claim", claim)
    name = recipe(tmp_path, scheme=RAGGED, servable=True)
    assert command("quantize", model(), "--recipe", name, "--output", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "recipe small is meant to be served, but: the result could not be exported" in err
    assert "nothing was made yet" in err


def test_exports_follow_the_run_and_the_same_command_does_nothing_more(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = ["dense", "compressed-tensors"]
    asked = [argument for name in formats for argument in ("--export", name)]
    given = ("quantize", model(), "--recipe", "int8", "--output", tmp_path / "out", *asked)
    assert command(*given, "--json") == 0
    made = json.loads(capsys.readouterr().out)["exports"]
    store = open_store(str(tmp_path / "out"))
    assert [one["format"] for one in made] == formats
    assert [one["to"] for one in made] == [store.url(f"exports/{name}") for name in formats]
    before = exported(store)
    assert {f"exports/{name}/{EXPORT_KEY}" for name in formats} <= set(before)
    assert command(*given) == 0
    assert exported(store) == before


class KilledError(BaseException):
    """Ends a process."""


@pytest.mark.parametrize(
    "key",
    # Of each kind one; tests/pipeline/export kills the export itself at every write.
    by_default(
        ["exports/dense.json", PLAN_KEY, MANIFEST_KEY, "export-part-00001.json", EXPORT_KEY],
        ["export-part-00001.json"],
    ),
)
def test_whoever_resumes_a_run_killed_at_any_write_finishes_its_exports(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def quantize(output: Path) -> list[str]:
        output_and_export = ("--output", str(output), "--export", "dense")
        return ["quantize", str(model()), "--recipe", "int8", *output_and_export]

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def written(store: ObjectStore, name: str, data: bytes) -> None:
            if name == key:
                raise KilledError
            write(store, name, data)

        return written

    assert command(*quantize(tmp_path / "whole")) == 0
    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", dying(ObjectStore.create))
        patch.setattr(ObjectStore, "put", dying(ObjectStore.put))
        with pytest.raises(KilledError):
            main(quantize(output))
    started = (output / PLAN_KEY).exists()
    assert command(*(["resume", str(output)] if started else quantize(output))) == 0
    assert exported(open_store(str(output))) == exported(open_store(str(tmp_path / "whole")))


def test_no_one_exports_what_was_found_not_finite(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("quantize", model(), "--recipe", "int8", "--output", tmp_path / "out") == 0
    store = open_store(str(tmp_path / "out"))
    Evaluation(
        manifest_sha256=read_manifest(store).record_sha256,
        measured_on={},
        figures={"not_finite": "values that are not finite in 1 of 2 windows"},
    ).save(store)
    want_exports(store, [ExportSettings(format="dense")])
    assert command("resume", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "not exported, since the result gives values that are not finite in 1 of 2" in err
    assert set(exported(store)) == {"exports/dense.json"}


def test_an_export_needs_a_preset_and_like_an_export(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--recipe", "int8", "--output", tmp_path / "out")
    assert command("quantize", "a.keras", *given, "--export", "gptq") == 2
    assert "--export" in capsys.readouterr().err
    assert command("quantize", model(), *given, "--export", "gguf") == 2
    assert "--export gguf: choose one of compressed-tensors, gptq, dense" in capsys.readouterr().err
    assert command("quantize", model(), *given, "--like", tmp_path) == 2
    assert "--like is of an export" in capsys.readouterr().err
