"""Hugging Face models through KerasHub's own converters: their JSON, and each variable's tensor."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.preset_utils import list_subclasses
from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.noted_config import (
    NotedConfig,
    normalized_config,
    scaled_positions,
    taken_over,
)
from pipeline.model.preset import CONFIG_FILE, PresetFiles, keras_errors
from pipeline.model.recorded_tensors import Step
from pipeline.model.sentence_transformers import embedder_arguments, is_sentence_transformer
from pipeline.model.source_config import check_config
from quantizer.keras_format.generated_names import apart

_DTYPES = ("float32", "float16", "bfloat16")
# How the names of architectures end whose output is the next token's logits.
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def find_converter(preset: PresetFiles) -> ModuleType:
    """KerasHub's converter for this architecture."""
    try:
        loader = TransformersPresetLoader(preset.url, preset.parse(CONFIG_FILE))
    except (ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise SourceError(
            f"{preset.url}/{CONFIG_FILE}: {reason}; if KerasHub has the architecture, name a "
            "KerasHub preset of the model instead"
        ) from None
    converter: ModuleType = loader.converter
    return converter


def kerashub_subclass(parent: type, backbone_class: type) -> Any | None:
    """KerasHub's class of a kind, such as CausalLM or Tokenizer, for a backbone, if there is one.

    Of several it is the one of the plainest name. KerasHub itself takes the first of a set, which
    is another one in some processes (`MistralTekkenTokenizer` for `MistralTokenizer`).
    """
    found = [c for c in list_subclasses(parent) if c.backbone_cls == backbone_class]
    return min(found, key=lambda c: (len(c.__name__), c.__name__), default=None)


def tokenizer_class(preset: PresetFiles) -> Any:
    """The class to load a Hugging Face model's tokenizer with.

    Raises:
        SourceError: KerasHub has none for its architecture.
    """
    backbone_class = find_converter(preset).backbone_cls
    found = kerashub_subclass(keras_hub.models.Tokenizer, backbone_class)
    if found is None:
        raise SourceError(f"{preset.url}: KerasHub has no tokenizer for {backbone_class.__name__}")
    return found


def convert_config(preset: PresetFiles) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The JSON of backbone and task that KerasHub would save after loading this model.

    The dtype is the model's own (torch_dtype). An encoder of images or sounds keeps the dtype that
    its converter gives it: float32. The task is a text embedder if the folder is one of
    sentence-transformers, else a language model if the architecture names one, else a text
    embedder; none if KerasHub has no such task.

    Raises:
        SourceError: no converter, or a config that it does not understand.
    """
    converter = find_converter(preset)
    backbone_class = converter.backbone_cls
    config = normalized_config(preset.parse(CONFIG_FILE))
    arguments = _backbone_arguments(preset, converter, config)
    dtype = _stated_dtype(config) or _stated_dtype(config.get("text_config") or {})
    policy = keras.DTypePolicy(dtype if dtype in _DTYPES else "float32")
    arguments["dtype"] = keras.dtype_policies.serialize(policy)
    task_class, extra = _task_class(preset, backbone_class), {}
    embeds = task_class is not None and issubclass(task_class, keras_hub.models.TextEmbedder)
    if embeds and "tie_word_embeddings" in arguments:
        # It has no head, and its source often none either.
        arguments["tie_word_embeddings"] = True
    backbone_json = serialized_object(backbone_class, arguments)
    if task_class is None:
        return backbone_json, None
    if embeds:
        extra = embedder_arguments(preset, converter, backbone_json)
    task_config = {"backbone": backbone_json, "preprocessor": None, **extra}
    return backbone_json, serialized_object(task_class, task_config)


def check_converted(preset: PresetFiles, backbone: Any, generates: bool) -> None:
    """Check that a backbone built from `convert_config` computes what config.json says.

    Raises:
        SourceError: it does not, or config.json has a setting of unknown effect.
    """
    config = normalized_config(preset.parse(CONFIG_FILE))
    _backbone_arguments(preset, find_converter(preset), config)
    check_config(preset, config, backbone, generates)


def _backbone_arguments(
    preset: PresetFiles, converter: ModuleType, config: NotedConfig
) -> dict[str, Any]:
    backbone_class = converter.backbone_cls
    where = f"{preset.url}/{CONFIG_FILE}"
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{where}: the model is already quantized ({method}); start from the float model that "
            "it was made from, or from a KerasHub preset of the model"
        )
    parameters = inspect.signature(backbone_class).parameters
    scaled = scaled_positions(config, parameters)
    options: list[Any] = [config]
    if len(inspect.signature(converter.convert_backbone_config).parameters) != 1:
        options.append(backbone_class)
    problem = f"{where}: KerasHub's converter for {backbone_class.__name__} failed"
    with (
        keras_errors(problem, "a value is missing or has a newer format"),
        apart(),
        keras.StatelessScope(initialize_variables=False),
    ):
        converted = converter.convert_backbone_config(*options)
        # An encoder of images is a live model, which KerasHub's backbones also take as JSON.
        text = json.dumps(converted, default=keras.saving.serialize_keras_object)
    arguments: dict[str, Any] = json.loads(text)
    if "vision_encoder" in parameters:
        # KerasHub reads it back even where a converter leaves it out.
        arguments.setdefault("vision_encoder", None)
    return {**arguments, **scaled, **taken_over(config, parameters)}


def _stated_dtype(config: Mapping[str, Any]) -> Any:
    return config.get("torch_dtype") or config.get("dtype")


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


def _task_class(preset: PresetFiles, backbone_class: type) -> Any | None:
    architecture = str((preset.parse(CONFIG_FILE).get("architectures") or [""])[0])
    generates = architecture.endswith(_GENERATES)
    if generates and not is_sentence_transformer(preset):
        return kerashub_subclass(keras_hub.models.CausalLM, backbone_class)
    return kerashub_subclass(keras_hub.models.TextEmbedder, backbone_class)


Hook = Callable[[NDArray[Any], list[int]], Any]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How KerasHub's converter fills one variable: from tensors, or with a constant."""

    tensor: str = ""
    """Full name of the tensor in the safetensors files; "" for a constant and for a recipe."""
    hook: Hook | None = None
    """Turns the tensor into the variable's value, given the variable's shape."""
    constant: NDArray[Any] | None = None
    recipe: Step | None = None
    """What it makes of several tensors, such as those of all experts."""
    of_a_row: Step | None = None
    """The same for one index of the first axis of variable and tensors, where `recipe` decodes."""


@dataclass(frozen=True, kw_only=True)
class Conversions:
    """How KerasHub's converter fills a backbone."""

    by_path: Mapping[str, Conversion]
    """Of each variable that it fills, by variable path."""
    tensors: frozenset[str]
    """Full names of all tensors whose values it takes."""


def converted_value(
    conversion: Conversion, value: NDArray[Any], shape: tuple[int, ...], where: str
) -> NDArray[Any]:
    """A tensor's value in the form that a variable takes, in the tensor's own dtype.

    Raises:
        SourceError: the tensor is too small or has other axes than the converter expects.
    """
    if conversion.hook is None:
        return value
    try:
        return np.asarray(conversion.hook(value.view(_Uncast), list(shape)))
    except (ValueError, IndexError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(
            f"{where}: shape {value.shape} does not convert to {shape}, which config.json implies "
            f"({reason}); weights and config are not of the same model, or KerasHub lacks a "
            "setting of it, such as heads of their own width"
        ) from None


class _Uncast(np.ndarray):
    """Keeps its floating-point dtype.

    Some converters cast to float16, whatever the model's dtype. Values beyond 65,504 would become
    infinite, and small ones lose bits; a variable's dtype is decided elsewhere.
    """

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        if keras.backend.is_float_dtype(str(np.dtype(dtype))):
            return self
        return super().astype(dtype, *args, **kwargs)
