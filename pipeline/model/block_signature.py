"""What a block computes, as a digest: blocks of one signature share compiled programs."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

# Attributes that do not affect what a layer computes.
_IGNORED = frozenset({"name", "path", "parent_path", "built", "trainable", "dtype_policy"})


def block_signature(layer: keras.layers.Layer, call: str) -> str:
    """A digest of a block's classes, settings, shapes and dtypes of variables, and its call.

    Settings are read from the layers' attributes: KerasHub's `get_config()` raises for some blocks
    and omits arguments of others.
    """
    described = [call, *_describe_layer(layer, "")]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _describe_layer(layer: keras.layers.Layer, position: str) -> Iterator[str]:
    layer_class = type(layer)
    settings = {
        name: text
        for name, value in sorted(vars(layer).items())
        if name.lstrip("_") not in _IGNORED and (text := _plain(value)) is not None
    }
    variables = [
        (str(variable.name), list(variable.shape), str(variable.dtype))
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]
    ]
    dtypes = (str(layer.dtype_policy.name), str(layer.compute_dtype))
    names = (layer_class.__module__, layer_class.__qualname__)
    yield json.dumps([position, *names, settings, variables, dtypes])
    for index, inner in enumerate(layer._layers):
        yield from _describe_layer(inner, f"{position}/{index}")


def _plain(value: Any) -> str | None:
    """A setting as text that is the same in every process; None if the value is not a setting."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords])
    if isinstance(value, Mapping):
        return _plain([[str(key), value[key]] for key in value])
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        array = np.ascontiguousarray(value)
        return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return None
