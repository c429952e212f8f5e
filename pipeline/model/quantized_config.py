"""A source preset's JSON, patched so that stock KerasHub builds quantized layers from it.

Only the backbone's dtype changes. Nothing comes from `get_config()`, which forgets arguments (tied
embeddings, special tokens).
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
from pipeline.model.preset import CONFIG_FILE, TASK_FILE
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
        policies: policy name by exact layer path, from `layer_policy`.

    Raises:
        ArtifactError: a policy that Keras does not have for this base.
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
        config: content of config.json.

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
    is always written: the source's, or one for a task that needs no weights of its own.

    Args:
        files: the source's JSON files by name: config.json and, if present, task.json,
            preprocessor.json and tokenizer.json.
        policies: as for `policy_map`.

    Raises:
        ArtifactError: the source is already quantized, or KerasHub has no task for its backbone.
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
    return {CONFIG_FILE: preset_json(config), TASK_FILE: preset_json(task)}


def _task_around(config: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    backbone_class = keras.saving.get_registered_object(config["registered_name"])
    for name in _TASKS:
        try:
            task_class = find_subclass(CONFIG_FILE, getattr(keras_hub.models, name), backbone_class)
        except ValueError:
            continue
        return serialized_object(
            task_class,
            {"backbone": config, "preprocessor": _preprocessor(task_class, files)},
        )
    raise ArtifactError(
        f"{CONFIG_FILE}: KerasHub has none of the tasks {', '.join(_TASKS)} for "
        f"{config['registered_name']}, and loads quantized models as tasks only"
    )


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


def serialized_object(keras_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """An object of a Keras class, in the form in which Keras serializes it."""
    # Keras would number the default name by the objects of the process.
    name = re.sub("([a-z0-9])([A-Z])", r"\1_\2", keras_class.__name__).lower()
    return {
        "module": keras_class.__module__,
        "class_name": keras_class.__name__,
        "config": {"name": name, **config},
        "registered_name": keras.saving.get_registered_name(keras_class),
    }


def preset_json(content: Mapping[str, Any]) -> bytes:
    """A preset's JSON file: keys in the given order, as Keras writes them."""
    return (json.dumps(content, indent=4) + "\n").encode("ascii")
