"""Run source and result over the same windows, each one block in memory at a time."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from keras import tree
from numpy.typing import NDArray

from pipeline.compute.streamed import StreamedModel
from pipeline.fidelity import WindowFidelity

_TOKENS_AT_ONCE = 2048


def compare(
    source: StreamedModel,
    result: StreamedModel,
    tokens: NDArray[np.int32],
    mask: NDArray[np.bool_],
    *,
    causal: bool,
) -> list[WindowFidelity]:
    """Run both models over windows, one block in memory at a time.

    Args:
        tokens, mask: [windows, sequence].
        causal: whether the output is logits of the next token.
    """
    size = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
    starts = range(0, len(tokens), size)
    batches = [(tokens[a : a + size], mask[a : a + size]) for a in starts]
    streams = []
    for model in (source, result):
        states = [list(state) for state in model.embed(batches)]
        for block in range(model.num_blocks):
            model.advance(block, states)
        streams.append(np.concatenate([np.asarray(state[0]) for state in states]))
    heads = [source.head(), result.head()]
    found = []
    for i in range(len(tokens)):
        window = slice(i, i + 1)
        before, after = (
            head(stream[window], tokens[window], mask[window])
            for head, stream in zip(heads, streams, strict=True)
        )
        if causal:
            found.append(_causal(before, after, tokens[window], mask[window]))
        else:
            found.append(_encoder(before, after, mask[window]))
    return found


def _causal(
    source: Array, result: Array, tokens: NDArray[np.int32], mask: NDArray[np.bool_]
) -> WindowFidelity:
    sums = _logit_sums(source, result, jnp.asarray(tokens), jnp.asarray(mask))
    source_loss, result_loss, divergence, agreement, count = (float(value) for value in sums)
    return WindowFidelity(
        count=int(count),
        source_loss=source_loss,
        result_loss=result_loss,
        divergence=divergence,
        agreement=int(agreement),
    )


@jax.jit
def _logit_sums(source: Array, result: Array, tokens: Array, mask: Array) -> tuple[Array, ...]:
    """Sums over a window's predicted tokens; logits [1, sequence, vocabulary]."""
    keep = (mask[:, 1:] & mask[:, :-1]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(source[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(result[:, :-1].astype(jnp.float32))
    following = tokens[:, 1:, None]
    losses = [-jnp.take_along_axis(log, following, axis=-1)[..., 0] for log in (log_p, log_q)]
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    terms = (*losses, divergence, same.astype(jnp.float32), jnp.ones_like(divergence))
    return tuple(jnp.sum(keep * term) for term in terms)


def _encoder(source: Any, result: Any, mask: NDArray[np.bool_]) -> WindowFidelity:
    cosines = []
    for p, q in zip(tree.flatten(source), tree.flatten(result), strict=True):
        left, right = (np.asarray(value, np.float64) for value in (p, q))
        if left.ndim == 3:  # a vector a token: padding's mean nothing
            left, right = left[mask], right[mask]
        left, right = (value.reshape(-1, value.shape[-1]) for value in (left, right))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosines.append(np.sum(left * right, axis=1) / np.maximum(norms, 1e-30))
    flat = np.concatenate(cosines)
    return WindowFidelity(count=len(flat), cosine=math.fsum(flat))
