"""Loads presets as stock KerasHub does, but for the random values that their weights replace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras.initializers import RandomNormal, RandomUniform, TruncatedNormal, VarianceScaling


def load_stock(kind: Any, preset: Path, **options: Any) -> Any:
    """`kind.from_preset`, with NaN for each initial value that stock Keras draws at random.

    XLA takes half a second to compile the draws of one shape. What no weight replaces stays NaN,
    so that whoever compares notices.

    Args:
        kind: a class of KerasHub's, a task or a backbone.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Whatever else draws at random inherits from these.
        for initializer in (RandomNormal, RandomUniform, TruncatedNormal, VarianceScaling):
            patch.setattr(initializer, "__call__", _nothing)
        return kind.from_preset(str(preset), **options)


def _nothing(self: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    dtype = dtype or keras.config.floatx()
    return keras.ops.convert_to_tensor(np.full(shape, np.nan, dtype), dtype=dtype)
