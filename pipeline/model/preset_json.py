"""The JSON and vocabularies of an artifact, from which stock KerasHub builds quantized layers.

A KerasHub preset's files are kept, except for the backbone's dtype; a Hugging Face model's are
converted. Nothing comes from `get_config()`, which forgets arguments (tied embeddings, special
tokens).
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import keras_hub

from pipeline.errors import ArtifactError
from pipeline.model.huggingface import kerashub_subclass, serialized_object, tokenizer_class
from pipeline.model.preset import CONFIG_FILE, TASK_FILE, PresetFiles, keras_errors
from pipeline.model.skeleton import Skeleton
from quantizer.keras_format.generated_names import apart
from quantizer.schemes import Int8Scheme, Scheme

# The task to name if the source names none: the first that KerasHub has for the backbone. The
# first two have no weights of their own; the head of a masked language model stays untrained, but
# its backbone can be used.
_TASKS = ("CausalLM", "TextEmbedder", "MaskedLM")


def layer_policy(scheme: Scheme) -> str:
    """The dtype policy by which a preset requests a scheme, such as "gptq/4/128".

    Raises:
        ArtifactError: a preset cannot request it.
    """
    if isinstance(scheme, Int8Scheme) and not scheme.quantize_activations:
        # Backbones pass dtype policies to their layers, but no QuantizationConfig, and the policy
        # "int8" always quantizes the inputs too.
        raise ArtifactError(
            "a KerasHub preset cannot request int8 weights alone: stock KerasHub would quantize "
            "the inputs as well; use quantize_activations: true, or gptq with weight_bits: 8"
        )
    return scheme.policy


def policy_map(base_policy: str, policies: Mapping[str, str]) -> dict[str, Any]:
    """Keras' DTypePolicyMap, serialized.

    Args:
        base_policy: of all other layers, such as "bfloat16".
        policies: from `layer_policy`, by exact layer path.

    Raises:
        ArtifactError: a policy that Keras does not have for this base.
    """
    keras_map = keras.dtype_policies.DTypePolicyMap(base_policy)
    for path in sorted(policies):
        try:
            keras_map[path] = keras.dtype_policies.get(f"{policies[path]}_from_{base_policy}")
        except ValueError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            remedy = "; choose --dtype bfloat16 or float32" if base_policy == "float16" else ""
            raise ArtifactError(
                f"{path}: Keras refuses {policies[path]!r} on {base_policy!r}: {reason}{remedy}"
            ) from None
    serialized: dict[str, Any] = keras.dtype_policies.serialize(keras_map)
    return serialized


def base_policy(config: Mapping[str, Any]) -> str:
    """The dtype policy in the content of a config.json.

    Raises:
        ArtifactError: the source is already quantized.
    """
    saved = config["config"].get("dtype") or "float32"
    name = saved if isinstance(saved, str) else saved.get("config", {}).get("name")
    try:
        policy = keras.dtype_policies.get(name) if isinstance(name, str) else None
    except ValueError:
        policy = None
    if policy is None or policy.quantization_mode is not None:
        raise ArtifactError(
            f"{CONFIG_FILE}: its dtype is not a plain floating-point policy ({name or saved}): the "
            "model is already quantized; start from the float model"
        )
    return str(policy.name)


def quantized_json(files: Mapping[str, bytes], policies: Mapping[str, str]) -> dict[str, bytes]:
    """The artifact's config.json and task.json; all other files are copied from the source.

    `Backbone.from_preset` drops a saved policy map (keras-hub 0.32), tasks keep it. So a task.json
    is written wherever KerasHub has a task: the source's, or one for a task that needs no weights
    of its own. A backbone without a task (Whisper's) is to be loaded with the dtype in config.json.

    Args:
        files: the source's JSON files by name.
        policies: as for `policy_map`.

    Raises:
        ArtifactError: the source is already quantized.
    """
    config = json.loads(files[CONFIG_FILE])
    dtype = policy_map(base_policy(config), policies)
    config["config"]["dtype"] = dtype
    if TASK_FILE in files:
        task = json.loads(files[TASK_FILE])
        backbone = task["config"].get("backbone")
        if isinstance(backbone, dict):
            backbone["config"]["dtype"] = dtype
        else:
            task["config"]["backbone"] = config
    else:
        task = _task_around(config, files)
    return {CONFIG_FILE: _as_json(config)} | ({TASK_FILE: _as_json(task)} if task else {})


def _task_around(config: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """A task that KerasHub has for a backbone, if there is one."""
    backbone_class = keras.saving.get_registered_object(config["registered_name"])
    for name in _TASKS:
        task_class = kerashub_subclass(getattr(keras_hub.models, name), backbone_class)
        if task_class is None:
            continue
        preprocessor = _preprocessor(task_class, files)
        return serialized_object(task_class, {"backbone": config, "preprocessor": preprocessor})
    return None


def _preprocessor(task_class: Any, files: Mapping[str, bytes]) -> dict[str, Any] | None:
    preprocessor_class = task_class.preprocessor_cls
    if preprocessor_class is None or "tokenizer.json" not in files:
        return None
    name = keras.saving.get_registered_name(preprocessor_class)
    if "preprocessor.json" in files:
        saved = json.loads(files["preprocessor.json"])
        if isinstance(saved, dict) and saved.get("registered_name") == name:
            return saved
    tokenizer = json.loads(files["tokenizer.json"])
    return serialized_object(preprocessor_class, {"tokenizer": tokenizer})


def _as_json(content: Mapping[str, Any]) -> bytes:
    """JSON with its keys in the given order, as Keras writes them."""
    return (json.dumps(content, indent=4) + "\n").encode("ascii")


_VOCABULARIES = (".model", "tokenizer.json", "vocab.json", "vocab.txt")
# Arguments that `Llama3Tokenizer.get_config` forgets, with the tokenizer's attributes for them.
_FORGOTTEN = {"bos_token": "start_token", "eos_token": "end_token"}


def conversion_notes(files: Mapping[str, bytes], policies: Mapping[str, str]) -> list[str]:
    """What to tell of the files of `converted_files`, with policies as for `policy_map`."""
    written = quantized_json(files, policies)
    if TASK_FILE not in written:
        return []
    task = json.loads(written[TASK_FILE])
    name, notes = task["class_name"], []
    if TASK_FILE not in files and name.endswith("MaskedLM"):
        notes.append(
            f"the result is a {name}, since KerasHub has no plainer task for this model: its "
            "backbone is the source's, but a head of its own would have no weights"
        )
    if "tokenizer.json" in files and task["config"].get("preprocessor") is None:
        notes.append(
            f"the result has a tokenizer, but no preprocessor, since KerasHub's for {name} needs "
            "TensorFlow: it takes token ids"
        )
    return notes


def converted_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """A Hugging Face model's small files in KerasHub's form, converted by KerasHub's own code.

    Licenses, a chat template and the settings of generation come along as they are.
    A model without a vocabulary gets no tokenizer, and its artifact takes token ids only.

    Args:
        skeleton: built from the preset, in the model's own dtype.

    Raises:
        SourceError: KerasHub cannot convert the tokenizer, or cannot read the result.
    """
    files = preset.accompanying()
    if any(name.endswith(_VOCABULARIES) for name in preset.sizes):
        files |= _tokenizer_files(preset, skeleton)
    files[CONFIG_FILE] = _as_json(skeleton.backbone_json)
    if skeleton.task_json is not None:
        task = {**skeleton.task_json, "config": dict(skeleton.task_json["config"])}
        if "preprocessor.json" in files:
            # Stock KerasHub builds a task without a preprocessor unless task.json has it.
            task["config"]["preprocessor"] = json.loads(files["preprocessor.json"])
        files[TASK_FILE] = _as_json(task)
    return files


def _tokenizer_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """JSON and vocabularies of tokenizer and preprocessor, by name."""
    preprocessor_class: Any = None if skeleton.task is None else skeleton.task.preprocessor_cls
    saved_class = preprocessor_class or tokenizer_class(preset)
    with (
        tempfile.TemporaryDirectory(prefix="source-") as source,
        tempfile.TemporaryDirectory(prefix="converted-") as converted,
    ):
        target = Path(converted)
        preset.copy_small_files(Path(source))
        # KerasHub recognizes a preset by its config.json.
        (target / CONFIG_FILE).write_bytes(_as_json(skeleton.backbone_json))
        problem = f"{preset.url}: KerasHub cannot convert its tokenizer"
        remedy = (
            "without its vocabulary files the model can be quantized for token ids alone, by a "
            "recipe that needs no calibration"
        )
        with keras_errors(problem, remedy, {source: preset.url, converted: "converted"}), apart():
            try:
                made = saved_class.from_preset(source)
            except ImportError:
                # Some preprocessors, of families that also take images, need TensorFlow.
                saved_class = tokenizer_class(preset)
                made = saved_class.from_preset(source)
            made.save_to_preset(converted)
            _complete(target, getattr(made, "tokenizer", made))
            saved_class.from_preset(converted)
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
        (target / name).write_bytes(_as_json(content))
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
