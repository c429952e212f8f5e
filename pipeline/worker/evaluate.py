"""Evaluate an artifact against its source, with one block of one model in memory at a time.

The artifact is run by Keras' own quantized layers, from the very bytes that were committed, so its
output is that of stock Keras.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import Array
from keras import tree
from numpy.typing import NDArray

from pipeline.artifact.parts import decode_part
from pipeline.fidelity import WindowFidelity
from pipeline.model.blocks import BlockGraph
from pipeline.model.tokenizer import model_inputs, text_inputs
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore
from pipeline.worker.model_state import ModelState

_TOKENS_PER_BATCH = 2048


def evaluate(
    source: StreamedModel,
    artifact: StreamedModel,
    tokens: NDArray[np.int32],
    mask: NDArray[np.bool_],
    *,
    predicts_tokens: bool,
) -> list[WindowFidelity]:
    """Run both models over windows, and compare their outputs.

    Args:
        tokens, mask: [windows, sequence].
        predicts_tokens: whether the output is the next token's logits.
    """
    size = max(1, _TOKENS_PER_BATCH // tokens.shape[1])
    starts = range(0, len(tokens), size)
    batches = [(tokens[a : a + size], mask[a : a + size]) for a in starts]
    last_hidden_states = [_last_hidden_states(model, batches) for model in (source, artifact)]
    heads = [source.head(), artifact.head()]
    fidelities = []
    for i in range(len(tokens)):
        window = slice(i, i + 1)
        before, after = (
            head(hidden_states[window], tokens[window], mask[window])
            for head, hidden_states in zip(heads, last_hidden_states, strict=True)
        )
        if predicts_tokens:
            fidelities.append(_compare_logits(before, after, tokens[window], mask[window]))
        else:
            fidelities.append(_compare_vectors(before, after, mask[window]))
    return fidelities


def _last_hidden_states(
    model: StreamedModel, batches: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]
) -> NDArray[Any]:
    """What leaves the last block, [windows, sequence, hidden]."""
    states = [list(state) for state in model.embed(batches)]
    for block in range(model.num_blocks):
        model.advance(block, states)
    return np.concatenate([np.asarray(state[0]) for state in states])


def _compare_logits(
    source: Array, artifact: Array, tokens: NDArray[np.int32], mask: NDArray[np.bool_]
) -> WindowFidelity:
    sums = _logit_sums(source, artifact, jnp.asarray(tokens), jnp.asarray(mask))
    source_loss, result_loss, divergence, agreement, count = (float(value) for value in sums)
    return WindowFidelity(
        count=int(count),
        source_loss=source_loss,
        result_loss=result_loss,
        divergence=divergence,
        agreement=int(agreement),
    )


@jax.jit
def _logit_sums(source: Array, artifact: Array, tokens: Array, mask: Array) -> tuple[Array, ...]:
    """The sums of `WindowFidelity`, its count last; logits are [1, sequence, vocabulary]."""
    keep = (mask[:, 1:] & mask[:, :-1]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(source[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(artifact[:, :-1].astype(jnp.float32))
    following = tokens[:, 1:, None]
    losses = [-jnp.take_along_axis(log, following, axis=-1)[..., 0] for log in (log_p, log_q)]
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
    terms = (*losses, divergence, same.astype(jnp.float32), jnp.ones_like(divergence))
    return tuple(jnp.sum(keep * term) for term in terms)


def _compare_vectors(source: Any, artifact: Any, mask: NDArray[np.bool_]) -> WindowFidelity:
    cosines = []
    for p, q in zip(tree.flatten(source), tree.flatten(artifact), strict=True):
        left, right = (np.asarray(value, np.float64) for value in (p, q))
        if left.ndim == 3:  # one vector per token: leave out padding
            left, right = left[mask], right[mask]
        left, right = (value.reshape(-1, value.shape[-1]) for value in (left, right))
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosines.append(np.sum(left * right, axis=1) / np.maximum(norms, 1e-30))
    flat = np.concatenate(cosines)
    return WindowFidelity(count=len(flat), cosine=math.fsum(flat))


Pairs = list[tuple[Any, NDArray[Any]]]
"""A model's variables, each with its value."""


class StreamedModel:
    """A model that runs part by part: embed → blocks → head, reading each part when it is due."""

    def __init__(self, graph: BlockGraph, read: Callable[[int], Pairs]) -> None:
        """Nothing is read yet.

        Args:
            graph: of the model, without weights.
            read: gives the values of a part: 0 is everything outside the blocks, i + 1 block i.
        """
        self.graph = graph
        self._read = read
        self._programs: dict[tuple[str, int], Any] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.graph.blocks)

    def embed(self, batches: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> list[Any]:
        """[hidden_states, *side_inputs] of each batch of (tokens, mask)."""
        embed = self.graph.embed
        pairs = self._read(0)
        program = self._program("embed", embed, pairs)
        values = [value for _, value in pairs]
        return [program(values, [model_inputs(embed, *batch)], {}) for batch in batches]

    def advance(self, block: int, states: list[Any]) -> None:
        """Send every batch through one block, in place."""
        pairs = self._read(block + 1)
        values = [value for _, value in pairs]
        found = self.graph.blocks[block]
        # Blocks of one signature list their variables in the same order, and share a program.
        program = self._program(found.signature, found.layer, pairs)
        for state in states:
            args, kwargs = found.bind(state[0], state[1:])
            state[0] = np.asarray(program(values, list(args), kwargs))

    def head(self) -> Callable[[Any, Any, Any], Array]:
        """The function (hidden_states, tokens, mask) → the model's output."""
        head = self.graph.head
        pairs = self._read(0)
        program = self._program("head", head, pairs)
        values = [value for _, value in pairs]

        def run(hidden_states: Any, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Array:
            inputs = self.graph.bind_head(hidden_states, text_inputs(tokens, mask))
            return program(values, [inputs], {})  # type: ignore[no-any-return]

        return run

    def _program(self, name: str, layer: Any, pairs: Pairs) -> Any:
        key = (name, len(pairs))
        if key not in self._programs:
            variables = [variable for variable, _ in pairs]

            def call(values: Sequence[Array], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
                mapping = list(zip(variables, values, strict=True))
                with keras.StatelessScope(state_mapping=mapping):
                    return layer(*args, **kwargs)

            self._programs[key] = jax.jit(call)
        return self._programs[key]


def source_model(model: ModelState) -> StreamedModel:
    """The source, in its own dtype if this machine can run it."""
    skeleton, _ = model.evaluation_skeletons
    variables = {str(v.path): v for v in skeleton.model.variables}

    def read(part: int) -> Pairs:
        return [(variables[path], value) for path, value in model.read(part).items()]

    return StreamedModel(model.evaluation_graphs[0], _cast(read))


def artifact_model(model: ModelState, store: ObjectStore) -> StreamedModel:
    """The artifact, from its committed files."""
    _, skeleton = model.evaluation_skeletons
    skeleton.mark_calibrated()
    variables = {stored.name_path: stored.variable for stored in skeleton.stored}
    of_backbone = {id(variable) for variable in skeleton.backbone.variables}
    of_task = {str(v.path): v for v in skeleton.model.variables if id(v) not in of_backbone}

    def read(part: int) -> Pairs:
        values = decode_part(model.parts[part], committed_file(store, part))
        pairs = [(variables[name_path], value) for name_path, value in values.items()]
        if part == 0 and of_task:
            source = model.read(0)
            pairs += [(v, source[path]) for path, v in of_task.items() if path in source]
        return pairs

    return StreamedModel(model.evaluation_graphs[1], _cast(read))


def _cast(read: Callable[[int], Pairs]) -> Callable[[int], Pairs]:
    """`read`, with values in their variables' dtypes."""
    return lambda part: [(v, np.asarray(value, np.dtype(v.dtype))) for v, value in read(part)]
