"""How a KerasHub converter fills each variable of a Hugging Face model, found without the weights.

A converter runs on a skeleton, with a loader that only records which tensors it requests for each
variable and what it would make of them. So every architecture that KerasHub converts is read
exactly as KerasHub reads it, one variable at a time, except that nothing is cast on the way.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.huggingface import (
    Conversion,
    Conversions,
    Hook,
    converted_value,
    find_converter,
)
from pipeline.model.noted_config import normalized_config
from pipeline.model.preset import CONFIG_FILE, PresetFiles, keras_errors
from pipeline.model.recorded_tensors import (
    RecordedTensor,
    Stored,
    keeps_rows,
    only_moves,
    stored_tensors,
)


def record_conversion(
    preset: PresetFiles,
    backbone: Any,
    tensors: Mapping[str, str],
    find: Callable[[str], Stored],
    read_small: Callable[[str], NDArray[Any]],
) -> Conversions:
    """Run KerasHub's converter on a weightless backbone, and record how it fills each variable.

    Args:
        backbone: of a skeleton used for nothing else, since the converter may assign to it.
        tensors: file of each tensor.
        find: returns shape and dtype of a tensor.
        read_small: returns the value of a tensor with which the converter computes what cannot be
            recorded, such as an embedding that it adds to another; refuses those too large.

    Raises:
        SourceError: a tensor is missing, or the converter computes with large ones.
    """
    before = {id(variable) for variable in backbone.variables if variable._value is not None}
    loader = _RecordingLoader(preset, tensors, find, read_small)
    _run_converter(preset, backbone, loader)
    for variable in backbone.variables:
        if variable._value is not None and id(variable) not in before:
            constant = Conversion(constant=np.asarray(variable.value))
            loader.conversions[str(variable.path)] = constant
    conversions = dict(loader.conversions)
    computed = {
        path: one.recipe
        for path, one in conversions.items()
        if one.recipe and not only_moves(one.recipe)
    }
    if computed:
        rows = _RecordingLoader(preset, tensors, lambda name: _first_row(find(name)), read_small)
        _run_converter(preset, backbone, rows)
        for path, recipe in computed.items():
            of_a_row = rows.conversions[path].recipe
            if of_a_row is None or not keeps_rows(of_a_row):
                raise loader.computes(stored_tensors(recipe)[0].name)
            conversions[path] = replace(conversions[path], of_a_row=of_a_row)
    return Conversions(by_path=conversions, tensors=frozenset(loader.used))


def _run_converter(preset: PresetFiles, backbone: Any, loader: _RecordingLoader) -> None:
    problem = f"{preset.url}: KerasHub's converter for {type(backbone).__name__} failed"
    with (
        keras_errors(problem, "config.json and weights are of different models"),
        contextlib.redirect_stdout(io.StringIO()),  # some print what they did
        assigning(backbone.variables, loader.assign),
    ):
        config = normalized_config(preset.parse(CONFIG_FILE))
        find_converter(preset).convert_weights(backbone, loader, config)


def _first_row(tensor: Stored) -> Stored:
    return replace(tensor, shape=(1, *tensor.shape[1:])) if tensor.shape else tensor


@contextlib.contextmanager
def assigning(variables: list[Any], note: Callable[[Any, RecordedTensor], None]) -> Iterator[None]:
    """Let a function of a variable and a recorded tensor do what assigning that to it does."""

    def assign(variable: Any, value: Any) -> None:
        if isinstance(value, RecordedTensor):
            note(variable, value)
        else:
            type(variable).assign(variable, value)

    for variable in variables:
        object.__setattr__(variable, "assign", partial(assign, variable))
    try:
        yield
    finally:
        for variable in variables:
            object.__delattr__(variable, "assign")


class _RecordingLoader(SafetensorLoader):  # type: ignore[misc]  # KerasHub carries no types
    """Answers like KerasHub's loader, but reads data only where the converter computes with it."""

    def __init__(
        self,
        preset: PresetFiles,
        tensors: Mapping[str, str],
        find: Callable[[str], Stored],
        read_small: Callable[[str], NDArray[Any]],
    ) -> None:
        contextlib.ExitStack.__init__(self)
        self.preset = preset.url
        self.safetensor_config = {"weight_map": tensors}
        self.safetensor_files: dict[str, Any] = {}
        self.prefix: str | None = None
        self.fname = None
        self.conversions: dict[str, Conversion] = {}
        self.used: set[str] = set()
        self._find = find
        self._read_small = read_small

    def get_tensor(self, hf_weight_key: str) -> RecordedTensor:
        floats, _, part = hf_weight_key.rpartition("_")
        tensors = self.safetensor_config["weight_map"]
        if part in _MXFP4_PARTS and self.get_prefixed_key(hf_weight_key, tensors) not in tensors:
            # Decoded already, as transformers saves it where it is asked to.
            found = self._find(self._full_key(floats))
            tensor = replace(found, shape=_MXFP4_PARTS[part](found.shape), decoded=True)
        else:
            tensor = self._find(self._full_key(hf_weight_key))
        return RecordedTensor(tensor, lambda stored: self._read(stored))

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        name = self._full_key(hf_weight_key)
        conversion = Conversion(tensor=name, hook=hook_fn)
        self.conversions[str(keras_variable.path)] = conversion
        self.used.add(name)
        keras_variable._value = None

        def initializer(shape: tuple[int, ...], dtype: str) -> Any:
            # Keras asks for this if the converter computes with the variable.
            where = f"{self.preset}: {name}"
            value = converted_value(conversion, self._read_small(name), tuple(shape), where)
            return keras.ops.convert_to_tensor(value, dtype)

        keras_variable._initializer = initializer

    def assign(self, variable: Any, value: RecordedTensor) -> None:
        """What a converter assigns itself."""
        stored = stored_tensors(value.step)
        self.used.update(tensor.name for tensor in stored)
        if any(tensor.decoded for tensor in stored):
            [name] = {tensor.name for tensor in stored}
            self.conversions[str(variable.path)] = Conversion(tensor=name)
        else:
            self.conversions[str(variable.path)] = Conversion(recipe=value.step)
        variable._value = None

    def computes(self, tensor: str) -> SourceError:
        return SourceError(
            f"{self.preset}: KerasHub's converter computes with tensor {tensor} in a way that "
            "cannot be done expert by expert; load the model with KerasHub, save_to_preset, and "
            "name that folder instead"
        )

    def _read(self, stored: Stored) -> NDArray[Any]:
        if stored.decoded:
            raise self.computes(stored.name)
        self.used.add(stored.name)
        return self._read_small(stored.name)

    def _full_key(self, key: str) -> str:
        tensors = self.safetensor_config["weight_map"]
        full_key = str(self.get_prefixed_key(key, tensors))
        if full_key not in tensors:
            # A model saved without heads names its tensors without itself: roberta.x is x.
            full_key = key.partition(".")[2]
        if full_key not in tensors:
            # A SourceError is also a ValueError, so converters may use this to test for a tensor.
            raise SourceError(
                f"{self.preset}: tensor {key} is missing from the safetensors files; they are "
                "incomplete, or of another model, or in a form that KerasHub's converter does not "
                "read (then name a KerasHub preset of the model)"
            )
        return full_key


_MXFP4_PARTS: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "blocks": lambda shape: (shape[0], shape[2], 1, shape[1] // 2),
    "scales": lambda shape: (shape[0], shape[2], 1),
}
"""What transformers appends to the name of a tensor [experts, inputs, outputs] that it stores in
MXFP4, and shapes that the parts may have."""
