"""Shapes and dtypes of what calls of blocks take, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from pipeline.model.blocks import Call, Glue
from pipeline.model.targets import outputs_with

Shapes = dict[int, Any]
"""Shapes and dtypes of values, by number (see `pipeline.model.blocks`)."""


def taken_by(call: Call, values: Shapes) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a call takes, once the glue before it has run, whose values are added."""
    if call.glue is not None:
        values |= _given_by(call.glue, values)
    return tuple(jax.ShapeDtypeStruct(values[n].shape, values[n].dtype) for n in call.takes)


def _given_by(glue: Glue, values: Mapping[int, Any]) -> Shapes:
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in glue.model.weights]
    taken = [values[number] for number in glue.takes]
    given = jax.eval_shape(lambda *args: outputs_with(glue.model, *args), weights, taken)
    return dict(zip(glue.gives, given, strict=True))
