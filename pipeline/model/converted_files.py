"""A Hugging Face model's small files as KerasHub saves them: config, task, tokenizer, assets."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras_hub

from pipeline.errors import SourceError
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import Skeleton, apart

_VOCABULARIES = (".model", "tokenizer.json", "vocab.json", "vocab.txt")
# Arguments that `Llama3Tokenizer.get_config` forgets, and where the tokenizer keeps them.
_FORGOTTEN = {"bos_token": "start_token", "eos_token": "end_token"}


def converted_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """By name; tokenizer and preprocessor are converted by KerasHub's own code.

    A model without a vocabulary gets neither: its artifact takes token ids alone.

    Args:
        preset: of kind "huggingface".
        skeleton: built from it, in the model's own dtype.

    Raises:
        SourceError: KerasHub cannot convert the tokenizer, or not read again what it made of it.
    """
    files = {}
    if any(name.endswith(_VOCABULARIES) for name in preset.sizes):
        files = _tokenizer_files(preset, skeleton)
    files["config.json"] = _json(skeleton.backbone_json)
    if skeleton.task_json is not None:
        task = {**skeleton.task_json, "config": dict(skeleton.task_json["config"])}
        if "preprocessor.json" in files:
            # Stock KerasHub takes it from here: what task.json leaves out, the task goes without.
            task["config"]["preprocessor"] = json.loads(files["preprocessor.json"])
        files["task.json"] = _json(task)
    return files


def _tokenizer_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """Of tokenizer and preprocessor: JSON and vocabularies, by name."""
    kind: Any = None if skeleton.task is None else skeleton.task.preprocessor_cls
    if kind is None:
        kind = keras_hub.tokenizers.Tokenizer
    with (
        tempfile.TemporaryDirectory(prefix="source-") as source,
        tempfile.TemporaryDirectory(prefix="converted-") as converted,
    ):
        target = Path(converted)
        preset.copy_small_files(Path(source))
        # A preset is known by its config.json.
        (target / "config.json").write_bytes(_json(skeleton.backbone_json))
        try:
            with apart():
                made = kind.from_preset(source)
                made.save_to_preset(converted)
                _complete(target, getattr(made, "tokenizer", made))
                kind.from_preset(converted)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            reason = reason.replace(source, preset.url).replace(converted, "converted")
            raise SourceError(
                f"{preset.url}: KerasHub cannot convert its tokenizer ({type(error).__name__}: "
                f"{reason}); without its vocabulary files the model can be quantized for token "
                "ids alone, by a recipe that needs no calibration"
            ) from error
        return {
            path.relative_to(target).as_posix(): path.read_bytes()
            for path in sorted(target.rglob("*"))
            if path.is_file()
        }


def _complete(target: Path, tokenizer: Any) -> None:
    """Add what KerasHub forgets, and put in order what it keeps as a set."""
    arguments = inspect.signature(type(tokenizer)).parameters
    for name in ("tokenizer.json", "preprocessor.json"):
        if not (target / name).exists():
            continue
        content = json.loads((target / name).read_bytes())
        config = content["config"]
        if name == "preprocessor.json":
            config = config["tokenizer"]["config"]
        for argument, attribute in _FORGOTTEN.items():
            if argument in arguments:
                config.setdefault(argument, getattr(tokenizer, attribute))
        if isinstance(config.get("unsplittable_tokens"), list):
            config["unsplittable_tokens"].sort()
        (target / name).write_bytes(_json(content))
    if "misc_special_tokens" in arguments:
        _add_tokens(target, sorted(arguments["misc_special_tokens"].default))


def _add_tokens(target: Path, tokens: list[str]) -> None:
    """Give a vocabulary, past its end, tokens that `Llama3Tokenizer` insists on.

    They are Llama 3's, and JSON cannot tell the class to do without. No text ever becomes one:
    they are not among the unsplittable tokens.
    """
    [path] = target.rglob("vocabulary.json")
    vocabulary = json.loads(path.read_bytes())
    following = max(vocabulary.values()) + 1
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        vocabulary |= {token: following + place for place, token in enumerate(missing)}
        path.write_text(json.dumps(vocabulary), encoding="utf-8")


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=4) + "\n").encode("ascii")
