"""A Hugging Face model's config as KerasHub's JSON, by KerasHub's own converters.

What KerasHub's converter would load into each variable, found out without loading anything.

The converter runs as always, on a skeleton, with a loader that notes which tensor it asks for and
how it would reshape it. So every architecture that KerasHub converts by `port_weight` is
understood exactly as KerasHub understands it, and each variable can be read by itself.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.preset_utils import find_subclass
from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.preset import PresetFiles

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


Hook = Callable[[NDArray[Any], list[int]], Any]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How one variable is made.

    Attributes:
        tensor: full name of the tensor in the safetensors files; None for a constant.
        hook: turns the tensor into the variable's value, given the variable's shape.
        constant: a value that the converter sets by itself.
    """

    tensor: str | None = None
    hook: Hook | None = None
    constant: NDArray[Any] | None = None


def record_conversion(
    preset: PresetFiles, backbone: Any, tensors: Mapping[str, str]
) -> dict[str, Conversion]:
    """Run KerasHub's converter on a weightless backbone; no variable keeps a value.

    Args:
        preset: a Hugging Face model.
        backbone: of a skeleton of its own.
        tensors: file of each tensor.

    Returns:
        A recipe by variable path, for each variable that the converter fills.

    Raises:
        SourceError: a tensor is missing, or the converter computes with tensors itself.
    """
    loader = _RecordingLoader(preset, tensors)
    before = {id(variable) for variable in backbone.variables if variable._value is not None}
    try:
        find_converter(preset).convert_weights(backbone, loader, preset.parse("config.json"))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{preset.url}: KerasHub's converter for {type(backbone).__name__} failed "
            f"({type(error).__name__}: {error}); config.json and weights are not of one model"
        ) from error
    for variable in backbone.variables:
        path = str(variable.path)
        if variable._value is not None and id(variable) not in before:
            loader.conversions.setdefault(path, Conversion(constant=np.asarray(variable.value)))
    return loader.conversions


class _RecordingLoader(SafetensorLoader):  # type: ignore[misc]  # KerasHub carries no types
    """Answers as KerasHub's loader does, but never with data."""

    def __init__(self, preset: PresetFiles, tensors: Mapping[str, str]) -> None:
        contextlib.ExitStack.__init__(self)
        self.preset = preset.url
        self.safetensor_config = {"weight_map": tensors}
        self.safetensor_files: dict[str, Any] = {}
        self.prefix: str | None = None
        self.fname = None
        self.conversions: dict[str, Conversion] = {}

    def get_tensor(self, hf_weight_key: str) -> _Untouchable:
        return _Untouchable(self.preset, self._full_key(hf_weight_key))

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        self.conversions[str(keras_variable.path)] = Conversion(
            tensor=self._full_key(hf_weight_key), hook=hook_fn
        )

    def _full_key(self, key: str) -> str:
        tensors = self.safetensor_config["weight_map"]
        full_key = str(self.get_prefixed_key(key, tensors))
        if full_key not in tensors:
            # Converters ask for a tensor to see whether it is there.
            raise SourceError(
                f"{self.preset}: tensor {key} is missing from the safetensors files; they are "
                "incomplete, or of another model"
            )
        return full_key


class _Untouchable:
    """A tensor that exists; converters that only ask that much are fine."""

    def __init__(self, url: str, name: str) -> None:
        self._message = (
            f"{url}: KerasHub's converter computes with tensor {name} itself (a mixture of "
            "experts, most likely); load the model with KerasHub, save_to_preset, and name that "
            "folder instead"
        )

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise SourceError(self._message)

    __array__ = __getitem__ = __len__ = __iter__ = __add__ = __matmul__ = __mul__ = _refuse

    def __getattr__(self, name: str) -> Any:
        raise SourceError(self._message)
