"""Evaluate an artifact against its source, with one block of one model in memory at a time.

Float16 holds nothing beyond 65504: values that are not finite after a block, or in the output, are
reported by where they first appear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from keras import tree
from numpy.typing import NDArray

from pipeline.evaluation.answers import ChoiceLikelihood
from pipeline.evaluation.batches import TOKENS_PER_PASS, Batch, EvaluationSet
from pipeline.evaluation.choices import TaskRows
from pipeline.fidelity import WindowFidelity
from pipeline.model.inputs import InputBatch, InputLayout
from pipeline.worker.streamed_model import BatchValues, StreamedModel


def evaluate(
    source: StreamedModel,
    artifact: StreamedModel,
    layout: InputLayout,
    given: EvaluationSet,
    numbers: Sequence[int],
    *,
    predicts_tokens: bool,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[list[WindowFidelity] | list[ChoiceLikelihood]]:
    """Run both models over batches, and compare their outputs.

    Args:
        numbers: of the batches.
        predicts_tokens: whether the output is the next token's logits; of an encoder–decoder, of
            the decoder's tokens.
        tokens_per_pass: how many may pass the blocks together; a batch is not divided.

    Returns:
        What was found of each row of each batch.
    """
    batches = [given.batches[number] for number in numbers]
    return [
        found
        for some in _passes(batches, tokens_per_pass)
        for found in _compare(
            source, artifact, layout, given, some, predicts_tokens=predicts_tokens
        )
    ]


def _passes(batches: Sequence[Batch], most_tokens: int) -> Iterator[list[Batch]]:
    """Batches that pass the blocks together: each pass reads every block once more."""
    some: list[Batch] = []
    for batch in batches:
        if some and sum(one.num_tokens for one in some) + batch.num_tokens > most_tokens:
            yield some
            some = []
        some.append(batch)
    if some:
        yield some


def _compare(
    source: StreamedModel,
    artifact: StreamedModel,
    layout: InputLayout,
    given: EvaluationSet,
    batches: Sequence[Batch],
    *,
    predicts_tokens: bool,
) -> Iterator[list[WindowFidelity] | list[ChoiceLikelihood]]:
    read = [given.windows_of(batch) for batch in batches]
    inputs = [layout.batch(windows, slice(None), len(windows.lengths)) for windows in read]
    last = [_last_values(model, inputs) for model in (source, artifact)]
    heads = [source.head(), artifact.head()]
    for index, (batch, windows) in enumerate(zip(batches, read, strict=True)):
        found: list[Any] = []
        for row, number in enumerate(batch.rows):
            one = layout.batch(windows, [row], 1)
            outputs, broken = [], []
            for head, (states, places) in zip(heads, last, strict=True):
                outputs.append(head(one_row(states[index], row), one))
                broken.append(places[index][row] or _broken_output(outputs[-1], one))
            before, after = outputs
            if batch.task is not None:
                compared: Any = _choice(before, after, given.tasks[batch.task], number, one)
            else:
                compared = compare_outputs(before, after, one, predicts_tokens=predicts_tokens)
            found.append(
                dataclasses.replace(
                    compared, source_broken_at=broken[0], result_broken_at=broken[1]
                )
            )
        yield found


def _last_values(
    model: StreamedModel, batches: Sequence[InputBatch]
) -> tuple[list[BatchValues], list[list[str]]]:
    """What the blocks leave to the head, for each batch.

    Also, for each of its rows, the first block that gives values which are not finite; "" if none
    does.
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
    taken = model.graph.head_takes
    return [{number: state[number] for number in taken} for state in states], broken


def one_row(values: BatchValues, row: int) -> BatchValues:
    """One row of each, [1, …], cut by one program for all rows."""
    return {
        number: lax.dynamic_index_in_dim(value, np.int32(row), keepdims=True)
        for number, value in values.items()
    }


def _broken_windows(value: Array, batch: InputBatch) -> NDArray[np.bool_]:
    """In which windows a vector that is not padding holds NaN or infinity, [batch]."""
    if value.ndim != 3:
        return np.zeros(len(batch.mask), bool)  # an attention mask may hold infinity
    return np.asarray(_not_finite(value, batch.rows(value.shape[:2])))


@jax.jit
def _not_finite(value: Array, keep: Array) -> Array:
    """Where it is, so that only the answer leaves a GPU."""
    return (~jnp.isfinite(value) & keep[..., None]).any(axis=(1, 2))


def _broken_output(output: Any, window: InputBatch) -> str:
    values = map(jnp.asarray, tree.flatten(output))
    return "the output" if any(_broken_windows(value, window).any() for value in values) else ""


def compare_outputs(
    source: Any, artifact: Any, window: InputBatch, *, predicts_tokens: bool
) -> WindowFidelity:
    """Compare what two models make of one window; see `evaluate`."""
    compare = _compare_logits if predicts_tokens else _compare_vectors
    return compare(source, artifact, window)


def _compare_logits(source: Array, artifact: Array, window: InputBatch) -> WindowFidelity:
    keep = window.mask[:, 1:] & window.mask[:, :-1]
    *sums, agreement, divergences = _logit_sums(source, artifact, window.tokens, keep)
    source_loss, result_loss, divergence = map(float, sums)
    return WindowFidelity(
        count=int(keep.sum()),
        source_loss=source_loss,
        result_loss=result_loss,
        divergence=divergence,
        agreement=int(agreement),
        divergences=np.asarray(divergences)[keep],
    )


@jax.jit
def _logit_sums(source: Array, artifact: Array, tokens: Array, keep: Array) -> tuple[Array, ...]:
    """The sums of `WindowFidelity`, and each token's divergence [1, positions - 1].

    Args:
        source, artifact: logits [1, positions, vocabulary].
        keep: [1, positions - 1]: which tokens, from the second, are predicted.
    """
    log_p, log_q = (_log_softmax(logits, tokens)[:, :-1] for logits in (source, artifact))
    losses = [-_of_tokens(log, tokens[:, 1:]) for log in (log_p, log_q)]
    divergences = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    terms = (*losses, divergences, same.astype(jnp.float32))
    # Padding may hold anything.
    return *(jnp.sum(jnp.where(keep, term, 0)) for term in terms), divergences


def _log_softmax(logits: Array, tokens: Array) -> Array:
    # Images may stand before the text.
    return jax.nn.log_softmax(logits[:, -tokens.shape[1] :].astype(jnp.float32))


def _of_tokens(log_p: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def _choice(
    source: Array, artifact: Array, task: TaskRows, row: int, read: InputBatch
) -> ChoiceLikelihood:
    """The likelihood of a task's row; its last token is predicted, and not read."""
    length = len(task.rows[row]) - 1
    following = np.zeros_like(read.tokens)
    following[0, :length] = task.rows[row][1:]
    scored = np.zeros(read.tokens.shape, bool)
    scored[0, length - task.scored[row] : length] = True
    sums = (_likelihood(logits, following, scored) for logits in (source, artifact))
    before, after = map(float, sums)
    return ChoiceLikelihood(source=before, result=after)


@jax.jit
def _likelihood(logits: Array, following: Array, scored: Array) -> Array:
    """Σ log p(following token) where scored; logits are [1, positions, vocabulary]."""
    log_p = _of_tokens(_log_softmax(logits, following), following)
    return jnp.sum(jnp.where(scored, log_p, 0))


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
