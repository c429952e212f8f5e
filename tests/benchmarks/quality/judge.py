"""One judge for every quantizer: a quantized model beside the float one, window by window.

Logits over the whole vocabulary are never kept: the float model's last hidden states are (2.3 kB a
token), once for a set of windows, and its output head runs again beside the quantized model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.quality.results import rounded

_BATCH = 16  # windows
_Tokens = NDArray[np.int32]


class Judge:
    """What models are judged by.

    Args:
        task: the float model, a `keras_hub.models.CausalLM`.
        origin: names its weights.
        windows: token windows [windows, tokens] without padding, by kind of text.
        folder: keeps the float model's hidden states.
        num_windows: of each kind that are judged on, the first ones; None for all.
    """

    def __init__(
        self,
        task: Any,
        origin: str,
        windows: Mapping[str, _Tokens],
        folder: Path,
        num_windows: int | None = None,
    ) -> None:
        self._windows, self._num_windows = dict(windows), num_windows
        content = hashlib.sha256(origin.encode())
        for kind, tokens_WT in sorted(self._windows.items()):
            content.update(f"{kind} {tokens_WT.shape}".encode() + tokens_WT.tobytes())
        self.digest = content.hexdigest()[:16]
        # A copy: the task's own may be given other weights.
        self._table_VD = jnp.array(task.backbone.token_embedding.embeddings.value)
        self._hidden = {
            kind: _kept(folder / f"float-{self.digest}-{kind}.npy", task, tokens_WT)
            for kind, tokens_WT in sorted(self._windows.items())
        }

    def judge(self, task: Any) -> dict[str, dict[str, list[float]]]:
        """A model's values per window, by kind of text and by `results.METRICS`."""
        hidden_of = _hidden_program(task)
        head = task.backbone.token_embedding
        variables = head.variables
        weights = [variable.value for variable in variables]

        @jax.jit
        def compare(
            weights: Any, table_VD: Any, theirs_BTD: Any, ours_BTD: Any, tokens: Any
        ) -> Any:
            def of_window(given: Any) -> Any:
                theirs_TD, ours_TD, following = given
                theirs = theirs_TD @ table_VD.T
                # Not by stateless_call: a layer whose dtype is of a map, as that of each layer of a
                # loaded artifact, it takes for a float one (Keras 3.15.1).
                with keras.StatelessScope(state_mapping=zip(variables, weights, strict=True)):
                    answer = head(ours_TD[None], reverse=True)
                ours = answer[0].astype(jnp.float32)
                # Not by log_softmax: passes over the vocabulary take as long as the products.
                theirs_sum, ours_sum = (jax.nn.logsumexp(x, axis=-1) for x in (theirs, ours))
                share = jnp.exp(theirs - theirs_sum[:, None])
                divergence = jnp.sum(share * (theirs - ours), axis=-1) - theirs_sum + ours_sum
                known, chosen = (
                    jnp.take_along_axis(x, following[:, None], axis=-1)[:, 0]
                    for x in (theirs, ours)
                )
                flipped = jnp.argmax(ours, axis=-1) != jnp.argmax(theirs, axis=-1)
                return (
                    jnp.mean(theirs_sum - known),
                    jnp.mean(ours_sum - chosen),
                    divergence,
                    jnp.mean(flipped),
                )

            return jax.lax.map(of_window, (theirs_BTD[:, :-1], ours_BTD[:, :-1], tokens[:, 1:]))

        found = {}
        for kind, all_WT in self._windows.items():
            tokens_WT = all_WT[: self._num_windows]
            parts = [
                compare(
                    weights,
                    self._table_VD,
                    self._hidden[kind][: len(tokens_WT)][batch],
                    hidden,
                    tokens_WT[batch],
                )
                for batch, hidden in _batches(hidden_of, tokens_WT)
            ]
            float_nll, nll, divergence, flips = (
                np.concatenate(values) for values in zip(*parts, strict=True)
            )
            found[kind] = {
                "float_nll": rounded(float_nll),
                "nll": rounded(nll),
                "kl": rounded(divergence.mean(axis=1)),
                "kl_p99": rounded(np.quantile(divergence, 0.99, axis=1)),
                "flips": rounded(flips),
            }
        return found


def _kept(file: Path, task: Any, tokens_WT: _Tokens) -> NDArray[np.float32]:
    """The float model's last hidden states [windows, tokens, features], computed once."""
    if not file.exists():
        parts = [np.asarray(part) for _, part in _batches(_hidden_program(task), tokens_WT)]
        written = file.with_suffix(".part.npy")
        np.save(written, np.concatenate(parts))
        written.rename(file)
    kept: NDArray[np.float32] = np.load(file, mmap_mode="r")
    return kept


def _batches(program: Any, tokens_WT: _Tokens) -> Iterator[tuple[slice, Any]]:
    for start in range(0, len(tokens_WT), _BATCH):
        batch = slice(start, start + _BATCH)
        yield batch, program(tokens_WT[batch])


def _hidden_program(task: Any) -> Any:
    """From tokens [windows, tokens] to the final norm's outputs."""
    backbone = task.backbone
    trainable = [variable.value for variable in backbone.trainable_variables]
    fixed = [variable.value for variable in backbone.non_trainable_variables]

    @jax.jit
    def run(trainable: Any, fixed: Any, tokens: Any) -> Any:
        inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
        return backbone.stateless_call(trainable, fixed, inputs, training=False)[0]

    return lambda tokens: run(trainable, fixed, tokens)
