"""A source preset's JSON, patched so that stock KerasHub builds quantized layers from it.

Only the backbone's dtype changes. What KerasHub writes itself forgets arguments (tied embeddings,
special tokens), so nothing here comes from `get_config()`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import keras
import keras_hub
from keras_hub.src.utils.preset_utils import find_subclass

from pipeline.errors import ArtifactError
from quantizer.schemes import Int8Scheme, Scheme

CONFIG_FILE = "config.json"
TASK_FILE = "task.json"

# Which task to name when the source names none: the first that KerasHub has for the backbone.
# Each but the last has no weights of its own; a masked language model's head stays untrained,
# but its backbone is there to be used.
_TASKS = ("CausalLM", "TextEmbedder", "MaskedLM")


def layer_policy(scheme: Scheme) -> str:
    """The name of the dtype policy by which a preset asks for a scheme, such as "gptq/4/128".

    Raises:
        ArtifactError: a preset has no way to say it.
    """
    if isinstance(scheme, Int8Scheme) and not scheme.quantize_activations:
        # Backbones pass dtype policies on to their layers, and no QuantizationConfig; the
        # policy "int8" always means that inputs are quantized too.
        raise ArtifactError(
            "a KerasHub preset cannot ask for int8 weights alone: stock KerasHub would quantize "
            "the inputs as well; use quantize_activations: true, or gptq with weight_bits: 8"
        )
    return scheme.policy


def policy_map(base_policy: str, policies: Mapping[str, str]) -> dict[str, Any]:
    """Keras' DTypePolicyMap, serialized.

    Args:
        base_policy: of all other layers, such as "bfloat16".
        policies: policy name by exact layer path, from `layer_policy`.

    Raises:
        ArtifactError: a policy that Keras does not know, or does not allow on this base.
    """
    keras_map = keras.dtype_policies.DTypePolicyMap(base_policy)
    for path in sorted(policies):
        try:
            keras_map[path] = keras.dtype_policies.get(f"{policies[path]}_from_{base_policy}")
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"{path}: Keras refuses {policies[path]!r} on {base_policy!r}: {reason}"
            ) from None
    serialized: dict[str, Any] = keras.dtype_policies.serialize(keras_map)
    return serialized


def base_policy(config: Mapping[str, Any]) -> str:
    """The dtype policy that a preset's backbone was saved with.

    Args:
        config: of config.json, parsed.

    Raises:
        ArtifactError: the source is quantized already.
    """
    saved = config["config"].get("dtype") or "float32"
    name = saved if isinstance(saved, str) else saved.get("config", {}).get("name")
    try:
        policy = keras.dtype_policies.get(name) if isinstance(name, str) else None
    except ValueError:
        policy = None
    if policy is None or policy.quantization_mode is not None:
        raise ArtifactError(
            f"{CONFIG_FILE}: its dtype is no plain floating-point policy ({name or saved}): the "
            "model is quantized already; start from the float model"
        )
    return str(policy.name)


def quantized_json(files: Mapping[str, bytes], policies: Mapping[str, str]) -> dict[str, bytes]:
    """The artifact's config.json and task.json; every other file of the source goes as it is.

    `Backbone.from_preset` drops a saved policy map (keras-hub 0.32), tasks keep it. So a task.json
    is always written: the source's, or else a task that needs no weights of its own.

    Args:
        files: the source's JSON files by name: config.json, and what there is of task.json,
            preprocessor.json and tokenizer.json.
        policies: as for `policy_map`.

    Raises:
        ArtifactError: the source is quantized, or KerasHub has no task for its backbone.
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
    return {CONFIG_FILE: _to_json(config), TASK_FILE: _to_json(task)}


def _task_around(config: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    backbone_class = keras.saving.get_registered_object(config["registered_name"])
    for name in _TASKS:
        try:
            task_class = find_subclass(CONFIG_FILE, getattr(keras_hub.models, name), backbone_class)
        except ValueError:
            continue
        return _serialized(
            task_class,
            {"backbone": config, "preprocessor": _preprocessor(task_class, files)},
        )
    raise ArtifactError(
        f"{CONFIG_FILE}: KerasHub has none of the tasks {', '.join(_TASKS)} for "
        f"{config['registered_name']}, and loads quantized models as tasks only"
    )


def _preprocessor(task_class: Any, files: Mapping[str, bytes]) -> dict[str, Any] | None:
    kind = task_class.preprocessor_cls
    if kind is None or "tokenizer.json" not in files:
        return None
    name = keras.saving.get_registered_name(kind)
    if "preprocessor.json" in files:
        saved = json.loads(files["preprocessor.json"])
        if isinstance(saved, dict) and saved.get("registered_name") == name:
            return saved
    return _serialized(kind, {"tokenizer": json.loads(files["tokenizer.json"])})


def _serialized(kind: Any, config: dict[str, Any]) -> dict[str, Any]:
    # A name of our own: Keras would count the objects of the process.
    name = re.sub("([a-z0-9])([A-Z])", r"\1_\2", kind.__name__).lower()
    return {
        "module": kind.__module__,
        "class_name": kind.__name__,
        "config": {"name": name, **config},
        "registered_name": keras.saving.get_registered_name(kind),
    }


def _to_json(content: dict[str, Any]) -> bytes:
    # In the source's order of keys, which is that of Keras.
    return (json.dumps(content, indent=4) + "\n").encode("ascii")
