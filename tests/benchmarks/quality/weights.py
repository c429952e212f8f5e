"""The weights that SmolLM2's blocks multiply by, whatever has quantized them.

They go by Hugging Face's names, [out_features, in_features], so that every quantizer's result can
be put into one float model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.models.smollm2 import BLOCK_WEIGHTS
from tests.models.smollm2_huggingface import LAYER_NAMES

Weights = Mapping[str, NDArray[np.float32]]
_WEIGHT_ONLY = (None, "gptq", "awq", "int4")
_TWO_INPUT_AXES = f"{LAYER_NAMES['attn_output']}.weight"
"""The kernel whose inputs are heads and their features; others have one axis of inputs."""


def put_weights(task: Any, weights: Weights) -> None:
    """Give the first blocks of a float model other weights.

    Args:
        task: SmolLM2's `Llama3CausalLM`, in float.
        weights: of every kernel and norm of these blocks, so that none stays in float unseen, or
            is another model's.

    Raises:
        ValueError: a layer has no weight, or a weight has no layer.
    """
    num_blocks = 1 + max(int(theirs.split(".")[2]) for theirs in weights)
    variables = {theirs: getattr(layer, name) for theirs, layer, name in _places(task, num_blocks)}
    if wrong := sorted(variables.keys() ^ weights.keys()):
        raise ValueError(f"weights and layers differ: {', '.join(wrong[:3])}")
    for theirs, weight in weights.items():
        variables[theirs].assign(weight.T.reshape(variables[theirs].shape))


def effective_weights(task: Any, shapes: Mapping[str, tuple[int, ...]]) -> Weights | None:
    """What a stock model's blocks multiply by; None if a layer is no product with a matrix.

    Args:
        task: as stock KerasHub loads it.
        shapes: of the float model's variables; see `variable_shapes`.
    """
    found = {}
    for theirs, layer, name in _places(task):
        if is_norm(theirs):
            found[theirs] = np.asarray(getattr(layer, name))
            continue
        if getattr(layer, "quantization_mode", None) not in _WEIGHT_ONLY:
            return None
        features = shapes[theirs][: 2 if theirs.endswith(_TWO_INPUT_AXES) else 1]
        size = math.prod(features)
        inputs = np.eye(size, dtype=np.float32).reshape(1, size, *features)
        found[theirs] = np.asarray(layer(inputs)).reshape(size, -1).T
    return found


def variable_shapes(task: Any) -> dict[str, tuple[int, ...]]:
    """Of a float model's blocks."""
    return {theirs: tuple(getattr(layer, name).shape) for theirs, layer, name in _places(task)}


def _places(task: Any, num_blocks: int | None = None) -> Iterator[tuple[str, Any, str]]:
    """Yield their name of each weight, and our layer and its attribute."""
    for index, block in enumerate(task.backbone.transformer_layers[:num_blocks]):
        for name, attribute in BLOCK_WEIGHTS.items():
            layer, _, variable = attribute.rpartition(".")
            theirs = f"model.layers.{index}.{LAYER_NAMES[name]}.weight"
            yield theirs, attrgetter(layer)(block), variable


def is_norm(theirs: str) -> bool:
    """Whether a weight is a norm's, which stays in float."""
    return "layernorm" in theirs
