import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs.cli.listings import describe_scheme
from jobs.cli.main import main
from quantizer.schemes import SCHEMES


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"quantfleet {version('quantfleet')}\n"


def test_a_dtype_becomes_part_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(
        "jobs.quantize.run_job", lambda job, recipe, *_, **__: planned.append(recipe)
    )
    for options in ([], ["--dtype", "bfloat16"]):
        assert run(["quantize", "preset", "--recipe", "int8", "--output", "out", *options]) == 0
    assert [recipe.dtype for recipe in planned] == [None, "bfloat16"]
    assert run(["quantize", "p", "--recipe", "int8", "--output", "o", "--dtype", "float8"]) == 2


def test_json_names_every_field_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schemes", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == list(SCHEMES)
    for mode, scheme in SCHEMES.items():
        assert printed[mode]["summary"]
        fields = printed[mode]["fields"]
        assert [field["name"] for field in fields] == [f.name for f in dataclasses.fields(scheme)]
        assert all(field["doc"] for field in fields), mode
        defaults = {f["name"]: f["default"] for f in fields if not f["required"]}
        required = {f["name"]: None for f in fields if f["required"]}
        assert required or scheme(**defaults) == scheme()


def test_table_shows_every_scheme_field_and_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert run(["schemes"]) == 0
    table = capsys.readouterr().out
    for mode, scheme in SCHEMES.items():
        assert mode in table
        for field in describe_scheme(scheme)["fields"]:
            assert field["name"] in table
            assert field["doc"] in table


def test_a_scheme_is_described_from_its_fields_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Example:
        """What it is for.

        More, that a table has no room for.
        """

        bits: int = dataclasses.field(metadata={"doc": "Bits a weight takes."})
        names: list[str] = dataclasses.field(default_factory=lambda: ["a"])

    assert describe_scheme(Example) == {
        "summary": "What it is for.",
        "fields": [
            {"name": "bits", "default": None, "required": True, "doc": "Bits a weight takes."},
            {"name": "names", "default": ["a"], "required": False, "doc": ""},
        ],
    }


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "schemes" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["shcemes"], ["schemes", "--jsno"], ["schemes", "extra"]])
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("quantfleet: ")
    assert printed.err.count("\n") == 1


def test_verify_imports_keras_only_once_its_backend_is_chosen() -> None:
    program = "import jobs.verify, sys; print('keras' in sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "False\n"


@pytest.mark.parametrize("arguments", [["--help"], ["schemes"]])
def test_starting_imports_no_array_library(arguments: list[str]) -> None:
    """In a fresh interpreter, since this one has long imported everything."""
    program = (
        "import atexit, sys\n"
        "heavy = {'jax', 'keras', 'keras_hub', 'tensorflow', 'torch'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from jobs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert finished.stderr == "[]\n"


def test_a_terminal_that_lacks_characters_gets_what_it_can_show() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "jobs.cli.start", "recipes"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert "gptq-w4-g128" in finished.stdout
    assert "128 ? 2048 tokens" in finished.stdout


def test_where_nothing_was_written_there_is_nothing_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(tmp_path)]) == 4
    said = capsys.readouterr().err
    assert said.startswith(f"quantfleet: {tmp_path}: neither manifest.json nor plan.json is there")
    assert "resume" not in said
