"""`quantfleet quantize model.keras`: from a plain Keras model to one that stock Keras loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import jobs.quantize_file
from jobs.cli.main import main


class Command:
    """The command line, and what it said: `out` and `err` of the last call."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        self.out, self.err = self._capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    def refused(self, *arguments: object) -> str:
        """The one line that a user's mistake costs."""
        assert self("quantize", *arguments) == 2
        assert self.err.count("\n") == 1
        return self.err


class ThisProcess:
    """Does a child's work here: as each child imports JAX and Keras, most calls use this."""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def use_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def local_process(_: Any) -> Iterator[ThisProcess]:
        yield ThisProcess()

    monkeypatch.setattr(jobs.quantize_file, "local_process", local_process)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16,), name="features"),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dense(16, name="logits"),
        ]
    )
    model.save(path / "model.keras")
    samples = np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    np.save(path / "features.npy", samples)
    (path / "recipe.yaml").write_text(
        "name: tiny\n"
        "scheme: {mode: gptq, weight_bits: 3, group_size: 8}\n"
        "rules: [{pattern: logits, scheme: null}]\n"
        "calibration: {texts: [none.jsonl], num_samples: 64}\n"
    )
    return path


def test_a_file_is_quantized_once_and_verified(
    folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    arguments = (folder / "model.keras", "--recipe", folder / "recipe.yaml", "--output", output)
    arguments = ("quantize", *arguments, "--inputs", f"features={folder / 'features.npy'}")
    assert command(*arguments) == 0
    assert "gptq/3/8" in command.err
    assert "left in float: logits: the rule 'logits' says so" in command.err
    assert f"keras.models.load_model('{output}/model.keras')" in command.err
    written = {path.name for path in output.iterdir()}
    beside = {"README.md", "eval.json", "card.json", "report.html"}
    assert written == {"manifest.json", "model.keras", *beside}
    made = (output / "model.keras").stat()

    # The plan is the same whichever process makes it.
    use_this_process(monkeypatch)
    assert command(*arguments, "--json") == 0
    assert "already complete" in command.err
    digest = json.loads(command.out)["plan_digest"]
    assert (output / "model.keras").stat() == made

    assert command("verify", output) == 0
    assert "loads it; output shape 2 × 16" in command.err

    elsewhere = (*arguments, "--output", tmp_path / "elsewhere")
    assert command(*elsewhere, "--dry-run", "--json") == 0
    planned: dict[str, Any] = json.loads(command.out)
    assert planned["plan_digest"] == digest
    assert [(layer["path"], bool(layer["scheme"])) for layer in planned["layers"]] == [
        ("hidden", True),
        ("logits", False),
    ]
    assert not (tmp_path / "elsewhere").exists()

    other = command.refused(folder / "model.keras", "--recipe", "int8", "--output", output)
    assert "manifest.json: another result is there" in other

    (output / "model.keras").write_bytes((folder / "model.keras").read_bytes())
    assert command("verify", output) == 4
    assert "model.keras is damaged" in command.err


def test_what_means_nothing_to_a_plain_model_is_refused(folder: Path, command: Command) -> None:
    model, output = folder / "model.keras", folder / "out"
    given = (model, "--recipe", "int8", "--output", output)
    for option, value in {
        "--texts": "a.jsonl",
        "--evaluate-on": "a.jsonl",
        "--workers": 2,
        "--address": "auto",
    }.items():
        line = command.refused(*given, option, value)
        assert line.startswith(f"quantfleet: {option} is for presets of KerasHub")
    assert "NAME=FILE.npy" in command.refused(*given, "--inputs", "features")
    over = command.refused(model, "--recipe", "int8", "--output", folder)
    assert "would be written over the source" in over
    assert not output.exists()
