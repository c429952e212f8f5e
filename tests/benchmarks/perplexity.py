"""One judge for every quantizer: the perplexity of one float model over the same token windows."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tests.models.smollm2 import BLOCK_WEIGHTS
from tests.models.smollm2_huggingface import LAYER_NAMES

BATCH_SIZE = 2  # a window's logits over the whole vocabulary take 100 MB


def perplexity(task: Any, tokens_WT: NDArray[np.int32]) -> float:
    """Of a causal language model, over every token of a window but its first.

    Args:
        task: the `keras_hub.models.CausalLM`, quantized or not.
        tokens_WT: [windows, tokens], without padding.
    """
    trainable = [variable.value for variable in task.trainable_variables]
    fixed = [variable.value for variable in task.non_trainable_variables]

    @jax.jit
    def loss_sum(trainable: Any, fixed: Any, tokens: Any) -> Any:
        inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
        logits, _ = task.stateless_call(trainable, fixed, inputs, training=False)
        logits = logits[:, :-1].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)

    losses = [
        float(loss_sum(trainable, fixed, tokens_WT[start : start + BATCH_SIZE]))
        for start in range(0, len(tokens_WT), BATCH_SIZE)
    ]
    num_predicted = tokens_WT.shape[0] * (tokens_WT.shape[1] - 1)
    return float(np.exp(sum(losses) / num_predicted))


def put_weights(task: Any, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Give SmolLM2's blocks other weights.

    Args:
        task: its `Llama3CausalLM`, in float.
        weights: [out_features, in_features] by Hugging Face's names: of every layer of every
            block, so that none stays in float unseen.

    Raises:
        ValueError: a layer has no weight, or a weight has no layer.
    """
    kernels = {}
    for index, block in enumerate(task.backbone.transformer_layers):
        for name, attribute in BLOCK_WEIGHTS.items():
            if attribute.endswith(".kernel"):
                theirs = f"model.layers.{index}.{LAYER_NAMES[name]}.weight"
                kernels[theirs] = attrgetter(attribute)(block)
    if kernels.keys() != weights.keys():
        raise ValueError(f"weights and layers differ: {sorted(kernels.keys() ^ weights.keys())}")
    for name, kernel in kernels.items():
        kernel.assign(weights[name].T.reshape(kernel.shape))
