"""The commands that load a release: those, and only those, that take what it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jobs.release.contents import Contents, Form
from pipeline.artifact.loading import load_call, load_call_in
from pipeline.model.preset import CONFIG_FILE, TASK_FILE
from pipeline.plain.plan import MODEL_KEY

_GENERATING = ("ForCausalLM", "LMHeadModel")
_FOR_CONFIG = ("import json", "import pathlib")
_PROMPT = "The capital of France is"
_NEEDS: dict[Form, str] = {
    # Later ones refuse the zero points that compressed-tensors packs.
    "compressed-tensors": "torch 'transformers<5.23' compressed-tensors",
    "dense": "torch transformers",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where readers find a release.

    Attributes:
        repository: on the hub; "" for a folder.
        revision: of the repository.
        folder: relative to where the card lies.
    """

    repository: str = ""
    revision: str = "main"
    folder: str = "."

    @property
    def name(self) -> str:
        """As transformers and vLLM take it."""
        return self.repository or self.folder

    @property
    def is_main(self) -> bool:
        """Whether nothing needs to be said of a revision."""
        return not self.repository or self.revision == "main"


@dataclass(frozen=True, kw_only=True)
class LoadCommand:
    """How one reader loads a release.

    Attributes:
        lines: of code, in `language`.
        note: what to know.
    """

    reader: str
    language: str
    lines: tuple[str, ...]
    note: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def load_commands(contents: Contents, place: Place) -> tuple[LoadCommand, ...]:
    """The commands for every reader of a release."""
    match contents.form:
        case "keras":
            return (_keras(place),)
        case "kerashub":
            return _keras_hub(contents, place)
        case "gptq":
            found = [_gptqmodel(contents, place)] if _generates(contents) else []
        case _:
            found = [_transformers(contents, place)]
    return tuple(found + _vllm(contents, place))


def _quoted(text: str) -> str:
    """A text that is plain by its pattern, as Python writes it."""
    return f'"{text}"'


def _download(place: Place) -> list[str]:
    """Lines that set `folder`."""
    if not place.repository:
        return [f"folder = {_quoted(place.folder)}"]
    revision = "" if place.is_main else f", revision={_quoted(place.revision)}"
    return [
        "import huggingface_hub",
        "",
        f"folder = huggingface_hub.snapshot_download({_quoted(place.repository)}{revision})",
    ]


def _keras(place: Place) -> LoadCommand:
    lines = [*_backend(), "import keras", *_download(place)]
    lines.append(f'model = keras.saving.load_model(folder + "/{MODEL_KEY}")')
    return LoadCommand(reader="Keras", language="python", lines=tuple(lines))


def _backend() -> list[str]:
    return ["import os", "", 'os.environ["KERAS_BACKEND"] = "jax"  # or "torch"']


def _keras_hub(contents: Contents, place: Place) -> tuple[LoadCommand, ...]:
    assert contents.run.plan is not None
    task = contents.run.plan.task
    lines = [*_backend(), "import keras_hub"]
    if place.is_main and not task.endswith("Backbone"):
        name = f"hf://{place.repository}" if place.repository else place.folder
        lines += ["", f"model = {load_call(task, _quoted(name))}"]
    else:
        lines += [*_FOR_CONFIG, *_download(place), f"model = {load_call(task, 'folder')}"]
    if task.endswith("CausalLM") and _has_preprocessor(contents):
        lines.append(f"print(model.generate({_quoted(_PROMPT)}, max_length=32))")
    config: Any = json.loads(contents.files[CONFIG_FILE].read())
    saved = str(config["config"]["dtype"]["config"]["default_policy"])
    other = "bfloat16" if saved == "float32" else "float32"
    changed = [*_backend(), *_FOR_CONFIG, "import keras_hub", "", *_download(place)]
    changed.append(f"model = {load_call_in(other, task, 'folder', saved)}")
    return (
        LoadCommand(reader="KerasHub", language="python", lines=tuple(lines)),
        LoadCommand(
            reader=f"KerasHub, computing in {other} instead of {saved}",
            language="python",
            lines=tuple(changed),
            note=f"The quantized layers are part of dtype=, so {other} alone would not load.",
        ),
    )


def _has_preprocessor(contents: Contents) -> bool:
    if TASK_FILE not in contents.files:
        return False
    task: Any = json.loads(contents.files[TASK_FILE].read())
    return task.get("config", {}).get("preprocessor") is not None


def _generates(contents: Contents) -> bool:
    named = (contents.config or {}).get("architectures") or [""]
    return isinstance(named, list) and str(named[0]).endswith(_GENERATING)


def _reads_text(contents: Contents) -> bool:
    """Whether transformers and vLLM find a tokenizer that needs nothing more to be installed."""
    names = contents.files.keys()
    return bool({"tokenizer.json", "vocab.txt"} & names) or {"vocab.json", "merges.txt"} <= names


def _transformers(contents: Contents, place: Place) -> LoadCommand:
    model = "AutoModelForCausalLM" if _generates(contents) else "AutoModel"
    given = _quoted(place.name) + ("" if place.is_main else f", revision={_quoted(place.revision)}")
    lines = [f"# pip install {_NEEDS[contents.form]}"]
    lines += ["import transformers", ""]
    lines.append(f'model = transformers.{model}.from_pretrained({given}, dtype="auto")')
    if _reads_text(contents):
        lines.append(f"tokenizer = transformers.AutoTokenizer.from_pretrained({given})")
    if _reads_text(contents) and _generates(contents):
        lines.append(f'tokens = tokenizer({_quoted(_PROMPT)}, return_tensors="pt")')
        lines.append("print(tokenizer.decode(model.generate(**tokens, max_new_tokens=16)[0]))")
    note = "" if _reads_text(contents) else "It takes token ids: no tokenizer.json comes with it."
    return LoadCommand(reader="transformers", language="python", lines=tuple(lines), note=note)


def _gptqmodel(contents: Contents, place: Place) -> LoadCommand:
    lines = ["# pip install gptqmodel"]
    name = _quoted(place.name)
    if not place.is_main:
        lines += _download(place)
        name = "folder"
    lines += ["from gptqmodel import GPTQModel", "", f"model = GPTQModel.load({name})"]
    if _reads_text(contents) and _generates(contents):
        lines.append(f"print(model.tokenizer.decode(model.generate({_quoted(_PROMPT)})[0]))")
    return LoadCommand(reader="GPTQModel", language="python", lines=tuple(lines))


def _vllm(contents: Contents, place: Place) -> list[LoadCommand]:
    """None where vLLM has no kernel for some matrix, or could not take text."""
    assert contents.export is not None
    tensors = contents.export.tensors
    if not (_generates(contents) and _reads_text(contents) and all(t.kernel for t in tensors)):
        return []
    kernels = sorted({t.kernel for t in tensors if t.kernel != "dense"})
    note = f"Its kernels for these matrices: {', '.join(kernels)}." if kernels else ""
    revision = "" if place.is_main else f" --revision {place.revision}"
    line = f"vllm serve {place.name}{revision}"
    return [LoadCommand(reader="vLLM", language="sh", lines=(line,), note=note)]
