"""A mixture of experts that was trained as one, as far as two cores allow in minutes.

The feed-forward layer of one block of SmolLM2-135M becomes eight experts, each a random half of its
neurons ("sparse upcycling", arXiv 2212.05055), with a random router. The model ends after this
block: experts, router, final norm and a head of the most frequent tokens are trained to predict the
next token of Python's manual, with the loss that balances experts of Switch Transformers (arXiv
2101.03961, eq. 4). So the router learns, by gradients, to send an expert what it is good at.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from tests.benchmarks.upcycled import (
    BLOCK,
    INTERMEDIATE,
    NUM_EXPERTS,
    PER_TOKEN,
    Expert,
    FeedForward,
    Float32,
    Mixture,
    read_text,
)
from tests.models.smollm2 import smollm2_preset
from tests.models.texts import calibration_documents, evaluation_documents

STEPS = 250
_TOKENS_OF_STEP = 1024
_FREQUENT = 2048
_WARM_STEPS, _RATE, _BALANCE = 20, 1e-3, 0.01
# An expert takes so many times its even share of the tokens of a step; the rest pass it by.
_CAPACITY = 1.25

Weights = dict[str, Array]


@dataclass(frozen=True)
class Texts:
    """What the block's feed-forward layer reads of two texts, and what the model is to predict.

    Attributes:
        layer: its weights, and its inputs at tokens of the two texts.
        residual_TH: what its output is added to; next_T: classes of the tokens after, of
            calibration.
        head_VH: the rows of the embedding table that belong to the classes.
    """

    layer: FeedForward
    residual_TH: Float32
    next_T: NDArray[np.int32]
    head_VH: Float32


def read_texts(calibration_tokens: int, evaluation_tokens: int) -> Texts:
    """Run SmolLM2's first blocks over both texts."""
    with tempfile.TemporaryDirectory() as folder:
        preset = smollm2_preset(folder + "/smollm2", dither=True, num_blocks=BLOCK + 1)
        task = keras_hub.models.CausalLM.from_preset(str(preset), dtype="float32")
    block = task.backbone.transformer_layers[BLOCK]
    kernels = [
        np.ascontiguousarray(np.asarray(getattr(block, f"_feedforward_{name}_dense").kernel).T)
        for name in ("gate", "intermediate", "output")
    ]
    calibration = read_text(task, calibration_documents(), calibration_tokens)
    evaluation = read_text(task, evaluation_documents(), evaluation_tokens)
    tokens_T = calibration.tokens_T
    frequent = np.argsort(-np.bincount(tokens_T), kind="stable")[: _FREQUENT - 1]
    table_VH = np.asarray(task.backbone.token_embedding.embeddings)
    class_of = np.full(len(table_VH), _FREQUENT - 1, np.int32)  # all others are one class
    class_of[frequent] = np.arange(len(frequent))
    others_H = table_VH[class_of == _FREQUENT - 1].mean(0, keepdims=True)
    return Texts(
        FeedForward(*kernels, calibration.inputs_TH, evaluation.inputs_TH),
        calibration.residual_TH,
        class_of[np.roll(tokens_T, -1)],
        np.concatenate([table_VH[frequent], others_H]),
    )


def trained_mixture(texts: Texts, seed: int, steps: int = STEPS) -> tuple[Mixture, list[float]]:
    """Train a mixture; returns it, and the loss of each step."""
    rng = np.random.default_rng(seed)
    weights = _initial(texts, rng)
    moments = jax.tree.map(jnp.zeros_like, (weights, weights))
    losses = []
    for step in range(steps):
        chosen = rng.choice(len(texts.next_T), _TOKENS_OF_STEP, replace=False)
        batch = (
            texts.layer.calibration_TH[chosen],
            texts.residual_TH[chosen],
            texts.next_T[chosen],
        )
        weights, moments, loss = _step(weights, moments, batch, np.float32(step), steps=steps)
        losses.append(float(loss))
    found = {name: np.asarray(value) for name, value in weights.items()}
    experts = [
        Expert(*(found[name][number] for name in ("gate", "up", "down")))
        for number in range(NUM_EXPERTS)
    ]
    router_EH = found["router"]
    return Mixture(experts, lambda inputs_TH: inputs_TH @ router_EH.T), losses


def _initial(texts: Texts, rng: np.random.Generator) -> Weights:
    layer = texts.layer
    halves = [
        np.sort(rng.permutation(len(layer.gate_IH))[:INTERMEDIATE]) for _ in range(NUM_EXPERTS)
    ]
    hidden = layer.gate_IH.shape[1]
    router_EH = rng.standard_normal((NUM_EXPERTS, hidden), np.float32) / hidden**0.5
    values = {
        "gate": np.stack([layer.gate_IH[half] for half in halves]),
        "up": np.stack([layer.up_IH[half] for half in halves]),
        # Twice, since routing weights sum to 1 and each has half of the neurons.
        "down": np.stack([2 * layer.down_HI[:, half] for half in halves]),
        "router": router_EH,
        "norm": np.ones(hidden, np.float32),
        "head": texts.head_VH,
    }
    return {name: jnp.asarray(value) for name, value in values.items()}


@partial(jax.jit, static_argnames="steps", donate_argnums=(0, 1))
def _step(
    weights: Weights, moments: Any, batch: Any, step: Array, *, steps: int
) -> tuple[Weights, Any, Array]:
    """One step of Adam, with a warm start and a cosine's decay."""
    loss, slopes = jax.value_and_grad(_loss)(weights, *batch)
    warm = jnp.minimum(1.0, (step + 1) / _WARM_STEPS)
    rate = _RATE * warm * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], slopes)
    square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, moments[1], slopes)
    of_mean, of_square = 1 - 0.9 ** (step + 1), 1 - 0.99 ** (step + 1)
    moved = jax.tree.map(
        lambda w, m, v: w - rate * (m / of_mean) / (jnp.sqrt(v / of_square) + 1e-8),
        weights, mean, square,
    )  # fmt: skip
    return moved, (mean, square), loss


def _loss(weights: Weights, inputs_TH: Array, residual_TH: Array, next_T: Array) -> Array:
    logits_TE = inputs_TH @ weights["router"].T
    best_TK, experts_TK = lax.top_k(logits_TE, PER_TOKEN)
    share_TK = jax.nn.softmax(best_TK)
    num_tokens = len(inputs_TH)
    capacity = int(_CAPACITY * num_tokens * PER_TOKEN / NUM_EXPERTS)
    hidden_TH = residual_TH
    sent_E = []
    for expert in range(NUM_EXPERTS):
        is_sent_T = (experts_TK == expert).any(1)
        taken = jnp.argsort(~is_sent_T, stable=True)[:capacity]
        share_T = (share_TK * (experts_TK == expert)).sum(1)[taken]  # 0 for those not sent
        rows = inputs_TH[taken]
        inner = jax.nn.silu(rows @ weights["gate"][expert].T) * (rows @ weights["up"][expert].T)
        output = inner @ weights["down"][expert].T
        hidden_TH = hidden_TH.at[taken].add(share_T[:, None] * output)
        sent_E.append(is_sent_T.mean() / PER_TOKEN)
    balance = NUM_EXPERTS * (jnp.stack(sent_E) * jax.nn.softmax(logits_TE).mean(0)).sum()
    scale_T1 = lax.rsqrt(jnp.square(hidden_TH).mean(1, keepdims=True) + 1e-5)
    scores_TV = jax.nn.log_softmax(hidden_TH * scale_T1 * weights["norm"] @ weights["head"].T)
    of_next_T = jnp.take_along_axis(scores_TV, next_T[:, None], 1)
    return _BALANCE * balance - of_next_T.mean()
