"""Hugging Face models through KerasHub's own converters: their JSON, and each variable's tensor.

A converter runs on a skeleton, with a loader that only records which tensor it requests for each
variable and how it would reshape it. So every architecture that KerasHub converts with
`port_weight` is read exactly as KerasHub reads it, one variable at a time.
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
from pipeline.model.preset import CONFIG_FILE, PresetFiles, keras_errors

_DTYPES = ("float32", "float16", "bfloat16")


def _find_converter(preset: PresetFiles) -> ModuleType:
    """KerasHub's converter for this architecture."""
    try:
        loader = TransformersPresetLoader(preset.url, preset.parse(CONFIG_FILE))
    except (ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"{preset.url}/{CONFIG_FILE}: {reason}") from None
    converter: ModuleType = loader.converter
    return converter


def convert_config(preset: PresetFiles) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The JSON of backbone and task that KerasHub would save after loading this model.

    The dtype is the model's own (torch_dtype). The task is a causal language model if the
    architecture names one, else a text embedder if KerasHub has one.

    Raises:
        SourceError: no converter, a config that it does not understand, or components other than
            the text model (a vision encoder).
    """
    converter = _find_converter(preset)
    config = preset.parse(CONFIG_FILE)
    backbone_class = converter.backbone_cls
    options = [config]
    if len(inspect.signature(converter.convert_backbone_config).parameters) != 1:
        options.append(backbone_class)
    with keras_errors(
        f"{preset.url}/{CONFIG_FILE}: KerasHub's converter for {backbone_class.__name__} failed",
        "a value is missing or has a newer format",
    ):
        arguments = converter.convert_backbone_config(*options)
    dtype = config.get("torch_dtype", config.get("dtype"))
    policy = keras.DTypePolicy(dtype if dtype in _DTYPES else "float32")
    arguments = {**arguments, "dtype": keras.dtype_policies.serialize(policy)}
    try:
        arguments = json.loads(json.dumps(arguments))
    except TypeError:
        raise SourceError(
            f"{preset.url}/{CONFIG_FILE}: a {backbone_class.__name__} with more than a text "
            "model; only text models can be quantized"
        ) from None
    backbone_json = serialized_object(backbone_class, arguments)
    return backbone_json, _task_json(preset, converter, backbone_json)


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


def _task_json(
    preset: PresetFiles, converter: ModuleType, backbone_json: dict[str, Any]
) -> dict[str, Any] | None:
    architecture = str((preset.parse(CONFIG_FILE).get("architectures") or [""])[0])
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    parent = keras_hub.models.CausalLM if generates else keras_hub.models.TextEmbedder
    try:
        task_class = find_subclass(preset.url, parent, converter.backbone_cls)
    except ValueError:
        return None
    extra: dict[str, Any] = {}
    if not generates and hasattr(converter, "load_task_config"):
        with tempfile.TemporaryDirectory() as folder:
            # The converter reads pooling and normalization from local files.
            for name, content in sorted(preset.json_files.items()):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(content)
            extra = converter.load_task_config(folder, preset.parse(CONFIG_FILE))
    config = {"backbone": backbone_json, "preprocessor": None, **extra}
    return serialized_object(task_class, config)


Hook = Callable[[NDArray[Any], list[int]], Any]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How KerasHub's converter fills one variable: from a tensor, or with a constant."""

    tensor: str = ""
    """Full name of the tensor in the safetensors files; "" for a constant."""
    hook: Hook | None = None
    """Turns the tensor into the variable's value, given the variable's shape."""
    constant: NDArray[Any] | None = None


def record_conversion(
    preset: PresetFiles, backbone: Any, tensors: Mapping[str, str]
) -> dict[str, Conversion]:
    """Run KerasHub's converter on a weightless backbone, and record how it fills each variable.

    Args:
        backbone: of a skeleton used for nothing else, since the converter may assign to it.
        tensors: file of each tensor.

    Returns:
        The conversion of each variable that the converter fills, by variable path.

    Raises:
        SourceError: a tensor is missing, or the converter computes with tensors itself.
    """
    loader = _RecordingLoader(preset, tensors)
    before = {id(variable) for variable in backbone.variables if variable._value is not None}
    with keras_errors(
        f"{preset.url}: KerasHub's converter for {type(backbone).__name__} failed",
        "config.json and weights are of different models",
    ):
        _find_converter(preset).convert_weights(backbone, loader, preset.parse(CONFIG_FILE))
    for variable in backbone.variables:
        path = str(variable.path)
        if variable._value is not None and id(variable) not in before:
            loader.conversions.setdefault(path, Conversion(constant=np.asarray(variable.value)))
    return loader.conversions


class _RecordingLoader(SafetensorLoader):  # type: ignore[misc]  # KerasHub carries no types
    """Answers like KerasHub's loader, but never with data."""

    def __init__(self, preset: PresetFiles, tensors: Mapping[str, str]) -> None:
        contextlib.ExitStack.__init__(self)
        self.preset = preset.url
        self.safetensor_config = {"weight_map": tensors}
        self.safetensor_files: dict[str, Any] = {}
        self.prefix: str | None = None
        self.fname = None
        self.conversions: dict[str, Conversion] = {}

    def get_tensor(self, hf_weight_key: str) -> _TensorWithoutData:
        return _TensorWithoutData(self.preset, self._full_key(hf_weight_key))

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
            # A SourceError is also a ValueError, so converters may use this to test for a tensor.
            raise SourceError(
                f"{self.preset}: tensor {key} is missing from the safetensors files; they are "
                "incomplete, or of another model"
            )
        return full_key


class _TensorWithoutData:
    """An existing tensor, for converters that only test for existence; any use of it raises."""

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
