"""What a model is fed for a window of tokens."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError


def text_inputs(tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """All that text gives a model, by the names that KerasHub has for it, each [batch, sequence].

    Args:
        tokens: [batch, sequence], int32.
        mask: [batch, sequence]: True where a token is text.
    """
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    return {
        "token_ids": tokens,
        "padding_mask": mask.astype(np.int32),
        "segment_ids": np.zeros_like(tokens),
        # Where a masked language model is to answer: everywhere.
        "mask_positions": np.broadcast_to(positions, tokens.shape),
    }


def model_inputs(model: keras.Model, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Any:
    """The inputs of a model that is fed a backbone's inputs, in the structure that it takes.

    Args:
        tokens: [batch, sequence], int32.
        mask: [batch, sequence]: True where a token is text.

    Raises:
        SourceError: the model wants something that text alone does not give.
    """
    given = text_inputs(tokens, mask)
    names = [tensor.name for tensor in model.inputs]
    unknown = sorted(set(names) - set(given))
    if unknown:
        raise SourceError(
            f"{model.name}: the model has the input {unknown[0]!r}; only models of text alone can "
            "be calibrated; choose a recipe that needs no calibration, such as int8"
        )
    arrays = {t.name: given[t.name].astype(t.dtype) for t in model.inputs}
    struct = model._inputs_struct
    return {n: arrays[n] for n in struct} if isinstance(struct, dict) else list(arrays.values())
