"""Evaluate an artifact against its source, with one block of one model in memory at a time.

Float16 holds nothing beyond 65504: values that are not finite after a block, or in the output, are
reported by where they first appear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from keras import tree
from numpy.typing import NDArray

from pipeline.calibration.windows import TokenWindows
from pipeline.fidelity import WindowFidelity
from pipeline.model.inputs import InputBatch, InputLayout
from pipeline.worker.streamed_model import BatchValues, StreamedModel

_TOKENS_PER_BATCH = 2048


def evaluate(
    source: StreamedModel,
    artifact: StreamedModel,
    layout: InputLayout,
    windows: TokenWindows,
    indices: Sequence[int],
    *,
    predicts_tokens: bool,
) -> list[WindowFidelity]:
    """Run both models over windows, and compare their outputs.

    Args:
        indices: of the windows.
        predicts_tokens: whether the output is the next token's logits; of an encoder–decoder, of
            the decoder's tokens.
    """
    size = max(1, _TOKENS_PER_BATCH // max(1, windows.tokens.shape[1]))
    chosen = [indices[a : a + size] for a in range(0, len(indices), size)]
    batches = [layout.batch(windows, some, len(some)) for some in chosen]
    (source_values, source_broken), (result_values, result_broken) = (
        _last_values(model, batches) for model in (source, artifact)
    )
    last_values = [source_values, result_values]
    heads = [source.head(), artifact.head()]
    fidelities = []
    for i, index in enumerate(indices):
        one = layout.batch(windows, [index], 1)
        before, after = (
            head({n: v[i : i + 1] for n, v in values.items()}, one)
            for head, values in zip(heads, last_values, strict=True)
        )
        source_broken[i] = source_broken[i] or _broken_output(before, one)
        result_broken[i] = result_broken[i] or _broken_output(after, one)
        if predicts_tokens:
            sums = _logit_sums(before, after, one.tokens, one.mask)
            source_loss, result_loss, divergence, agreement, count = map(float, sums)
            fidelity = WindowFidelity(
                count=int(count),
                source_loss=source_loss,
                result_loss=result_loss,
                divergence=divergence,
                agreement=int(agreement),
            )
        else:
            fidelity = _compare_vectors(before, after, one)
        fidelities.append(
            dataclasses.replace(
                fidelity, source_broken_at=source_broken[i], result_broken_at=result_broken[i]
            )
        )
    return fidelities


def _last_values(
    model: StreamedModel, batches: Sequence[InputBatch]
) -> tuple[BatchValues, list[str]]:
    """What the blocks leave to the head, [windows, …] each, by number.

    Also, for each window, the first block that gives values which are not finite; "" if none does.
    """
    states = model.embed(batches)
    broken = [[""] * len(batch.mask) for batch in batches]
    for number, call in enumerate(model.graph.calls):
        model.advance(number, states)
        name = model.graph.blocks[call.block].name
        for batch, state, places in zip(batches, states, broken, strict=True):
            for given in call.gives:
                for row in np.flatnonzero(_broken_windows(state[given], batch)):
                    places[row] = places[row] or f"block {call.block} ({name})"
    values = {
        number: np.concatenate([state[number] for state in states])
        for number in model.graph.head_takes
    }
    return values, [place for places in broken for place in places]


def _broken_windows(value: NDArray[Any], batch: InputBatch) -> NDArray[np.bool_]:
    """In which windows a vector that is not padding holds NaN or infinity, [batch]."""
    if value.ndim != 3:
        return np.zeros(len(batch.mask), bool)  # an attention mask may hold infinity
    broken: NDArray[np.bool_] = (~np.isfinite(value) & batch.rows(value.shape[:2])[..., None]).any(
        axis=(1, 2)
    )
    return broken


def _broken_output(output: Any, window: InputBatch) -> str:
    values = (np.asarray(value) for value in tree.flatten(output))
    return "the output" if any(_broken_windows(value, window).any() for value in values) else ""


@jax.jit
def _logit_sums(source: Array, artifact: Array, tokens: Array, mask: Array) -> tuple[Array, ...]:
    """The sums of `WindowFidelity`, its count last; logits are [1, positions, vocabulary]."""
    # Images may stand before the text.
    source, artifact = (logits[:, -tokens.shape[1] :] for logits in (source, artifact))
    keep = (mask[:, 1:] & mask[:, :-1]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(source[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(artifact[:, :-1].astype(jnp.float32))
    following = tokens[:, 1:, None]
    losses = [-jnp.take_along_axis(log, following, axis=-1)[..., 0] for log in (log_p, log_q)]
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    terms = (*losses, divergence, same.astype(jnp.float32), jnp.ones_like(divergence))
    # Padding may hold anything.
    return tuple(jnp.sum(jnp.where(keep > 0, term, 0)) for term in terms)


def _compare_vectors(source: Any, artifact: Any, window: InputBatch) -> WindowFidelity:
    cosines = []
    for pair in zip(tree.flatten(source), tree.flatten(artifact), strict=True):
        left, right = (np.asarray(value, np.float64) for value in pair)
        if left.ndim == 3:  # one vector per token: leave out padding
            mask = window.rows(left.shape[:2])
            left, right = left[mask], right[mask]
        left, right = (value.reshape(-1, value.shape[-1]) for value in (left, right))
        with np.errstate(invalid="ignore"):
            norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            cosines.append(np.sum(left * right, axis=1) / np.maximum(norms, 1e-30))
    flat = np.concatenate(cosines)
    return WindowFidelity(count=len(flat), cosine=math.fsum(flat))
