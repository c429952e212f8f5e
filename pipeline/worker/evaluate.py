"""Evaluate an artifact against its source, with one block of one model in memory at a time.

The artifact is run by Keras' own quantized layers, in its own dtype, from the very bytes that were
committed, so its output is that of stock Keras. Float16 holds nothing beyond 65504: values that are
not finite after a block, or in the output, are reported by where they first appear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import Array
from keras import tree
from numpy.typing import NDArray

from pipeline.artifact.parts import decode_part
from pipeline.calibration.windows import TokenWindows
from pipeline.fidelity import WindowFidelity
from pipeline.model.blocks import BlockGraph
from pipeline.model.inputs import InputBatch, InputLayout
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore
from pipeline.worker.model_state import ModelState

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


Pairs = list[tuple[Any, NDArray[Any]]]
"""A model's variables, each with its value."""

BatchValues = dict[int, NDArray[Any]]
"""What passes between the blocks for one batch, by number (see `pipeline.model.blocks`)."""


class StreamedModel:
    """A model that runs part by part: embed → blocks → head, reading each part when it is due."""

    def __init__(
        self, graph: BlockGraph, read: Callable[[int], Pairs], *, compute_dtype: str
    ) -> None:
        """Args: read: gives the values of a part: 0 outside the blocks, i + 1 for block i.

        compute_dtype: of most layers.
        """
        self.graph = graph
        self._read = read
        # On a CPU XLA keeps what lies between two operations in float32, where float16 would
        # overflow, and compiles no float16 attention. One by one they round as they do elsewhere.
        self._compiled = compute_dtype != "float16" or jax.default_backend() != "cpu"
        self._programs: dict[tuple[str, int], Any] = {}

    def embed(self, batches: Sequence[InputBatch]) -> list[BatchValues]:
        """What depends on no block, for each batch."""
        embed, numbers = self.graph.embed, self.graph.embedded
        run = self._load(0, "embed", embed)
        found = [run([batch.structured(embed)], {}) for batch in batches]
        return [_numbered(numbers, one) for one in found]

    def advance(self, call: int, states: Sequence[BatchValues]) -> None:
        """Send every batch through one call of a block and the glue before it, in place."""
        found = self.graph.calls[call]
        if found.glue is not None:
            run = self._load(0, f"glue {call}", found.glue.model)
            for state in states:
                results = run([[jnp.asarray(state[n]) for n in found.glue.takes]], {})
                state.update(_numbered(found.glue.gives, results))
        # Calls of one signature list their variables in the same order, and share a program.
        run = self._load(found.block + 1, found.signature, found.layer)
        still_used = {*self.graph.head_takes, *found.gives}
        for later in self.graph.calls[call + 1 : call + 2]:
            still_used.update(later.live, later.glue.takes if later.glue else ())
        for state in states:
            args, kwargs = found.bind([state[number] for number in found.takes])
            state.update(_numbered(found.gives, found.given(run(list(args), kwargs))))
            for number in set(state) - still_used:
                del state[number]

    def head(self) -> Callable[[BatchValues, InputBatch], Array]:
        """The function (values, batch) → the model's output."""
        run = self._load(0, "head", self.graph.head)
        return lambda values, batch: run([self.graph.bind_head(values, batch.arrays)], {})

    def _load(self, part: int, name: str, layer: Any) -> Callable[[list[Any], dict[str, Any]], Any]:
        """Read a part; returns the function (args, kwargs) → a layer's output with its values."""
        pairs = self._read(part)
        key = (name, len(pairs))
        if key not in self._programs:
            variables = [variable for variable, _ in pairs]

            def call(values: Sequence[Array], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
                mapping = list(zip(variables, values, strict=True))
                with keras.StatelessScope(state_mapping=mapping):
                    return layer(*args, **kwargs)

            self._programs[key] = jax.jit(call) if self._compiled else call
        values: list[Any] = [np.asarray(value, np.dtype(v.dtype)) for v, value in pairs]
        if not self._compiled:
            values = [jnp.asarray(value) for value in values]
        return partial(self._programs[key], values)


def _numbered(numbers: Sequence[int], outputs: Any) -> BatchValues:
    # Keras unpacks a list of one.
    return dict(zip(numbers, map(np.asarray, tree.flatten(outputs)), strict=True))


def source_model(model: ModelState) -> StreamedModel:
    """The source, in its own dtype."""
    (skeleton, graph), _ = model.evaluation_models
    variables = {str(v.path): v for v in skeleton.model.variables}

    def read(part: int) -> Pairs:
        return [(variables[path], value) for path, value in model.read(part).items()]

    return StreamedModel(graph, read, compute_dtype=model.compute_dtype)


def artifact_model(model: ModelState, store: ObjectStore) -> StreamedModel:
    """The artifact, from its committed files."""
    _, (skeleton, graph) = model.evaluation_models
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

    return StreamedModel(graph, read, compute_dtype=model.compute_dtype)
