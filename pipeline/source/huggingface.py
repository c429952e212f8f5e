"""A Hugging Face model's config as KerasHub's JSON, by KerasHub's own converters."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import keras_hub
from keras_hub.src.utils.preset_utils import find_subclass
from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader

from pipeline.errors import SourceError
from pipeline.source.preset import PresetFiles

_DTYPES = ("float32", "float16", "bfloat16")


def find_converter(preset: PresetFiles) -> ModuleType:
    """KerasHub's converter for this type of model.

    Raises:
        SourceError: KerasHub has none.
    """
    try:
        loader = TransformersPresetLoader(preset.url, preset.parse("config.json"))
    except (ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{preset.url}/config.json: {reason}") from None
    converter: ModuleType = loader.converter
    return converter


def convert_config(preset: PresetFiles) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The JSON of backbone and task that KerasHub would save, had it loaded this model.

    The dtype is the model's own (torch_dtype); the task is a causal language model for an
    architecture that says so, else a text embedder where KerasHub has one.

    Raises:
        SourceError: no converter, a config it does not understand, or parts beside the text
            model (a vision encoder).
    """
    converter = find_converter(preset)
    config = preset.parse("config.json")
    backbone_class = converter.backbone_cls
    options = [config]
    if len(inspect.signature(converter.convert_backbone_config).parameters) != 1:
        options.append(backbone_class)
    try:
        arguments = converter.convert_backbone_config(*options)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(
            f"{preset.url}/config.json: KerasHub's converter for {backbone_class.__name__} failed "
            f"({type(error).__name__}: {error}); a value is missing or of a newer format"
        ) from error
    dtype = config.get("torch_dtype", config.get("dtype"))
    policy = keras.DTypePolicy(dtype if dtype in _DTYPES else "float32")
    arguments = {**arguments, "dtype": keras.dtype_policies.serialize(policy)}
    try:
        arguments = json.loads(json.dumps(arguments))
    except TypeError:
        raise SourceError(
            f"{preset.url}/config.json: a {backbone_class.__name__} with parts beside the text "
            "model; only text models can be quantized"
        ) from None
    backbone_json = _serialized(backbone_class, arguments)
    return backbone_json, _task_json(preset, converter, backbone_json)


def _task_json(
    preset: PresetFiles, converter: ModuleType, backbone_json: dict[str, Any]
) -> dict[str, Any] | None:
    architecture = str((preset.parse("config.json").get("architectures") or [""])[0])
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    kind = keras_hub.models.CausalLM if generates else keras_hub.models.TextEmbedder
    try:
        task_class = find_subclass(preset.url, kind, converter.backbone_cls)
    except ValueError:
        return None
    extra: dict[str, Any] = {}
    if not generates and hasattr(converter, "load_task_config"):
        with tempfile.TemporaryDirectory() as folder:
            # The converter asks for pooling and normalization by local path.
            for name, content in sorted(preset.json_files.items()):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(content)
            extra = converter.load_task_config(folder, preset.parse("config.json"))
    return _serialized(task_class, {"backbone": backbone_json, "preprocessor": None, **extra})


def _serialized(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    name = re.sub("([a-z0-9])([A-Z])", r"\1_\2", kind.__name__).lower()
    return {
        "module": kind.__module__,
        "class_name": kind.__name__,
        "config": {"name": name, **config},
        "registered_name": keras.saving.get_registered_name(kind),
    }
