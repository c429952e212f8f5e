"""Where Keras stores each variable of a model in a weights file.

The layout is not computed here: Keras's own saving code walks the model and writes into a store
that only records what it is given. A weightless model (`pipeline.model.skeleton`) will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes  # noqa: F401  # teaches NumPy the names bfloat16, float8_e4m3fn, …
import numpy as np
from keras.src.backend.common import global_state
from keras.src.saving import saving_lib

from quantizer.keras_format.layers import complete_state

_SKIPLIST_NAMES = ("Operation", "Layer", "Functional", "Sequential")
"""Keras's names for the types of object that it walks in a model."""


@dataclass(frozen=True, kw_only=True)
class StoredVariable:
    """One variable of a model, and where the model's weights file holds it."""

    h5_group: str
    """HDF5 group, such as "layers/dense/vars"."""
    index: int
    """Name of the dataset within the group."""
    name: str
    """The layer's name for it: kernel, bias, quantized_kernel, kernel_scale, …"""
    layer_path: str
    """Path of the layer that owns it, such as "transformer_layer_0/feedforward_gate_dense"."""
    variable: Any
    """The `keras.Variable`, which determines shape and dtype in the file."""

    @property
    def key(self) -> str:
        """Path of the dataset."""
        return f"{self.h5_group}/{self.index}"

    @property
    def name_path(self) -> str:
        """Path that ends in the variable's name: the same before and after quantization.

        Keys differ: a bias moves from index 1 to 0 when gptq replaces the kernel, for example.
        """
        return f"{self.h5_group.removesuffix('vars')}{self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.variable.shape)

    @property
    def dtype(self) -> str:
        return str(self.variable.dtype)

    @property
    def num_bytes(self) -> int:
        """In memory, as Keras counts it."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def weight_layout(
    model: keras.Model, *, skip: Iterable[keras.layers.Layer] = ()
) -> tuple[StoredVariable, ...]:
    """Every variable of a model that a weights file holds, in the order in which Keras saves them.

    A variable shared by several layers (tied embeddings) appears once, where Keras stores it.

    Args:
        model: a built Keras model, with or without values.
        skip: layers to leave out with everything inside. Keras leaves the backbone's layers out
            of a task's own weights.
    """
    store = _Recorder()
    skipped = {id(layer) for layer in skip}
    quantized = [
        layer
        for layer in model._flatten_layers()
        if layer.built
        and hasattr(layer, "variable_serialization_spec")
        and getattr(layer, "quantization_mode", None) is not None
    ]
    with complete_state(quantized, lambda *named: named), _skipped_attributes_kept():
        saving_lib._save_state(
            model,
            weights_store=store,
            assets_store=None,
            inner_path="",
            visited_saveables=skipped,
        )
    return tuple(store.found)


class _Recorder(saving_lib.H5IOStore):  # type: ignore[misc]  # Keras carries no types
    """Stands in for the file while Keras saves: records variables, writes nothing."""

    def __init__(self) -> None:
        self.found: list[StoredVariable] = []
        self._group = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, **_: object) -> _Recorder:
        self._group = f"{path}/vars" if path else "vars"
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        name, variable = value if isinstance(value, tuple) else (value.name, value)
        # A quantized kernel's own path ends in "kernel"; the owner's name for it differs.
        owner = str(variable.path).rpartition("/")[0]
        self.found.append(
            StoredVariable(
                h5_group=self._group, index=int(key), name=name, layer_path=owner, variable=variable
            )
        )


@contextmanager
def _skipped_attributes_kept() -> Iterator[None]:
    """Compute once, and not at every layer, which attributes Keras skips while saving.

    Keras 3.15.1 caches them under one name and looks them up under another, so for every layer of
    the model it builds a layer to inspect: two thirds of the time of the walk.
    """
    names = {name: f"saving_attr_skiplist_{name}" for name in _SKIPLIST_NAMES}
    kept = {name: global_state.get_global_attribute(name) for name in names.values()}
    for name, attribute in names.items():
        global_state.set_global_attribute(attribute, saving_lib.get_attr_skipset(name))
    try:
        yield
    finally:
        for name, value in kept.items():
            global_state.set_global_attribute(name, value)
