"""A key that is equal for blocks that compute the same function of their variables.

Not `get_config()`: KerasHub's raises for some blocks and leaves arguments out for others.
What a layer keeps in plain attributes decides what it computes, so that is what counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

# Where a layer stands and what calls it, not what it computes.
_PLACE = frozenset({"name", "path", "parent_path", "built", "trainable", "dtype_policy"})


def block_kind(layer: keras.layers.Layer, call: str) -> str:
    """A digest of a block's classes, settings, variables' shapes and dtypes, and its call.

    Args:
        layer: a built block.
        call: how it is called.
    """
    described = [call, *_describe(layer, "")]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _describe(layer: keras.layers.Layer, place: str) -> Iterator[str]:
    kind = type(layer)
    settings = {
        name: text
        for name, value in sorted(vars(layer).items())
        if name.lstrip("_") not in _PLACE and (text := _plain(value)) is not None
    }
    variables = [
        (str(variable.name), list(variable.shape), str(variable.dtype))
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]
    ]
    dtypes = (str(layer.dtype_policy.name), str(layer.compute_dtype))
    yield json.dumps([place, kind.__module__, kind.__qualname__, settings, variables, dtypes])
    for index, inner in enumerate(layer._layers):
        yield from _describe(inner, f"{place}/{index}")


def _plain(value: Any) -> str | None:
    """A setting in words that are the same in every process; None for what is no setting."""
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
