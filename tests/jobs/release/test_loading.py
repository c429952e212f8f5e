"""That the commands work is shown by tests/integration/test_pushed_release.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jobs.release.contents import Contents, artifact_contents, export_contents, read_run
from jobs.release.loading import Place, load_commands
from pipeline.storage.object_store import open_store
from tests.jobs.release.runs import finished

HUB = Place(repository="someone/tiny")


def contents(
    form: str, kernel: str = "Marlin", *, tokenizer: bool = True, **config: Any
) -> Contents:
    """An export as it might be: the tiny one, with other kernels and files."""
    url = str(finished())
    found = export_contents(read_run(open_store(url), url), open_store(f"{url}/exports/ct"))
    assert found.export is not None
    assert found.config is not None
    first, *others = found.export.tensors
    tensors = [dataclasses.replace(one, kernel="Marlin") for one in others]
    tensors.append(dataclasses.replace(first, kernel=kernel))
    files = dict(found.files)
    if tokenizer:
        files["tokenizer.json"] = files["config.json"]
    return dataclasses.replace(
        found,
        form=form,
        files=files,
        config={**found.config, **config},
        export=dataclasses.replace(found.export, tensors=tuple(tensors)),
    )


def readers(found: Contents, place: Place = HUB) -> list[str]:
    return [command.reader for command in load_commands(found, place)]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("compressed-tensors", ["transformers", "vLLM"]),
        ("gptq", ["GPTQModel", "vLLM"]),
        ("dense", ["transformers", "vLLM"]),
    ],
)
def test_each_format_names_its_readers(form: str, expected: list[str]) -> None:
    assert readers(contents(form)) == expected
    assert readers(contents(form, kernel="")) == expected[:1]
    assert readers(contents(form, tokenizer=False)) == expected[:1]


def test_a_base_model_is_loaded_as_one_and_generates_nothing() -> None:
    encoder = {"architectures": ["MistralModel"]}
    [command] = load_commands(contents("compressed-tensors", **encoder), HUB)
    assert "AutoModel.from_pretrained" in command.text
    assert "generate" not in command.text
    assert readers(contents("gptq", **encoder)) == []


def test_without_a_tokenizer_nobody_is_told_to_use_it() -> None:
    [command] = load_commands(contents("compressed-tensors", tokenizer=False), HUB)
    assert "AutoTokenizer" not in command.text
    assert "token ids" in command.note


def test_a_branch_is_named_by_every_command() -> None:
    place = dataclasses.replace(HUB, revision="w4")
    url = str(finished())
    artifact = artifact_contents(read_run(open_store(url), url))
    for found in (contents("compressed-tensors"), contents("gptq"), contents("dense"), artifact):
        for command in load_commands(found, place):
            assert "someone/tiny" in command.text
            assert 'revision="w4"' in command.text or "--revision w4" in command.text
            if command.language == "python":
                compile(command.text, command.reader, "exec")
