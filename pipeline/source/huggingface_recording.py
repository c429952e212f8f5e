"""What KerasHub's converter would load into each variable, found out without loading anything.

The converter runs as always, on a skeleton, with a loader that notes which tensor it asks for and
how it would reshape it. So every architecture that KerasHub converts by `port_weight` is
understood exactly as KerasHub understands it, and each variable can be read by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.source.huggingface import find_converter
from pipeline.source.preset import PresetFiles

Hook = Callable[[NDArray[Any], list[int]], Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
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
) -> dict[str, Recipe]:
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
            loader.recipes.setdefault(path, Recipe(constant=np.asarray(variable.value)))
    return loader.recipes


class _RecordingLoader(SafetensorLoader):  # type: ignore[misc]  # KerasHub carries no types
    """Answers as KerasHub's loader does, but never with data."""

    def __init__(self, preset: PresetFiles, tensors: Mapping[str, str]) -> None:
        contextlib.ExitStack.__init__(self)
        self.preset = preset.url
        self.safetensor_config = {"weight_map": tensors}
        self.safetensor_files: dict[str, Any] = {}
        self.prefix: str | None = None
        self.fname = None
        self.recipes: dict[str, Recipe] = {}

    def get_tensor(self, hf_weight_key: str) -> _Untouchable:
        return _Untouchable(self.preset, self._full_key(hf_weight_key))

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        self.recipes[str(keras_variable.path)] = Recipe(
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
