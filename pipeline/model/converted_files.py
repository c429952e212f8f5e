"""A Hugging Face model's small files in KerasHub's form: config, task, tokenizer, assets."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import keras_hub

from pipeline.errors import SourceError
from pipeline.model.preset import CONFIG_FILE, TASK_FILE, PresetFiles
from pipeline.model.quantized_config import preset_json
from pipeline.model.skeleton import Skeleton, apart

_VOCABULARIES = (".model", "tokenizer.json", "vocab.json", "vocab.txt")
# Arguments that `Llama3Tokenizer.get_config` forgets, with the tokenizer's attributes for them.
_FORGOTTEN = {"bos_token": "start_token", "eos_token": "end_token"}


def converted_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """Files by name; KerasHub's own code converts tokenizer and preprocessor.

    A model without a vocabulary gets neither, and its artifact takes token ids only.

    Args:
        preset: of format "huggingface".
        skeleton: built from it, in the model's own dtype.

    Raises:
        SourceError: KerasHub cannot convert the tokenizer, or cannot read the result.
    """
    files = {}
    if any(name.endswith(_VOCABULARIES) for name in preset.sizes):
        files = _tokenizer_files(preset, skeleton)
    files[CONFIG_FILE] = preset_json(skeleton.backbone_json)
    if skeleton.task_json is not None:
        task = {**skeleton.task_json, "config": dict(skeleton.task_json["config"])}
        if "preprocessor.json" in files:
            # Stock KerasHub builds a task without a preprocessor unless task.json has it.
            task["config"]["preprocessor"] = json.loads(files["preprocessor.json"])
        files[TASK_FILE] = preset_json(task)
    return files


def _tokenizer_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """JSON and vocabularies of tokenizer and preprocessor, by name."""
    saved_class: Any = None if skeleton.task is None else skeleton.task.preprocessor_cls
    if saved_class is None:
        saved_class = keras_hub.tokenizers.Tokenizer
    with (
        tempfile.TemporaryDirectory(prefix="source-") as source,
        tempfile.TemporaryDirectory(prefix="converted-") as converted,
    ):
        target = Path(converted)
        preset.copy_small_files(Path(source))
        # KerasHub recognizes a preset by its config.json.
        (target / CONFIG_FILE).write_bytes(preset_json(skeleton.backbone_json))
        try:
            with apart():
                made = saved_class.from_preset(source)
                made.save_to_preset(converted)
                _complete(target, getattr(made, "tokenizer", made))
                saved_class.from_preset(converted)
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
    """Add the arguments that KerasHub forgets, and sort those that it keeps in a set."""
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
        (target / name).write_bytes(preset_json(content))
    if "misc_special_tokens" in arguments:
        _add_tokens(target, sorted(arguments["misc_special_tokens"].default))


def _add_tokens(target: Path, tokens: list[str]) -> None:
    """Append to the vocabulary the special tokens that `Llama3Tokenizer` requires.

    They are Llama 3's own, and no argument in the JSON makes them optional. No text is ever
    tokenized to one, since they are not among the unsplittable tokens.
    """
    [path] = target.rglob("vocabulary.json")
    vocabulary = json.loads(path.read_bytes())
    following = max(vocabulary.values()) + 1
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        vocabulary |= {token: following + index for index, token in enumerate(missing)}
        path.write_text(json.dumps(vocabulary), encoding="utf-8")
