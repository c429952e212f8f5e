"""A mixture of experts made from a real model's feed-forward layer, and what it really reads.

One block of SmolLM2-135M reads Python's manual. k-means of its feed-forward inputs is the router:
a token goes to the experts of its nearest centres, weighted by a softmax. An expert is the half
of the layer's neurons that are most active at the tokens of its cluster. So experts differ, their
inputs are a language model's, and no token's expert is chosen by chance; but no expert was trained
as one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras_hub
import numpy as np
from numpy.typing import NDArray

from tests.models.smollm2 import smollm2_preset
from tests.models.texts import calibration_documents, evaluation_documents

Float32 = NDArray[np.float32]

BLOCK = 4
WINDOW = 256
NUM_EXPERTS = 8
PER_TOKEN = 2
INTERMEDIATE = 768
_BATCH = 8
_KMEANS_STEPS = 20


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer and what it reads.

    Attributes:
        gate_IH, up_IH, down_HI: its weights, [out_features, in_features].
        calibration_TH, evaluation_TH: inputs at tokens of the two texts, which share no paragraph.
    """

    gate_IH: Float32
    up_IH: Float32
    down_HI: Float32
    calibration_TH: Float32
    evaluation_TH: Float32


@dataclass(frozen=True)
class Expert:
    """An expert's weights, [out_features, in_features]."""

    gate_IH: Float32
    up_IH: Float32
    down_HI: Float32

    def hidden(self, inputs_TH: Float32) -> Float32:
        """What down reads, [tokens, INTERMEDIATE]."""
        return activated(inputs_TH @ self.gate_IH.T, inputs_TH @ self.up_IH.T)


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    Attributes:
        experts_TK: numbers of a token's experts.
        weights_TK: of each, which sum to 1 for a token.
    """

    experts_TK: NDArray[np.int64]
    weights_TK: Float32

    def of_expert(self, number: int) -> tuple[NDArray[np.intp], Float32]:
        """The tokens that an expert gets, and their weights."""
        tokens, places = np.nonzero(self.experts_TK == number)
        return tokens, self.weights_TK[tokens, places]


def activated(gate_TI: Float32, up_TI: Float32) -> Float32:
    """SiLU(gate) · up."""
    return np.asarray(gate_TI / (1 + np.exp(-gate_TI)) * up_TI, np.float32)


def read_feed_forward(calibration_tokens: int, evaluation_tokens: int) -> FeedForward:
    """Run SmolLM2's first blocks over both texts."""
    with tempfile.TemporaryDirectory() as folder:
        preset = smollm2_preset(folder + "/smollm2", dither=True, num_blocks=BLOCK + 1)
        task = keras_hub.models.CausalLM.from_preset(str(preset), dtype="float32")
    block = task.backbone.transformer_layers[BLOCK]
    kernels = [
        np.asarray(getattr(block, f"_feedforward_{name}_dense").kernel).T
        for name in ("gate", "intermediate", "output")
    ]
    calibration = read_text(task, calibration_documents(), calibration_tokens)
    evaluation = read_text(task, evaluation_documents(), evaluation_tokens)
    gate_IH, up_IH, down_HI = map(np.ascontiguousarray, kernels)
    return FeedForward(gate_IH, up_IH, down_HI, calibration.inputs_TH, evaluation.inputs_TH)


@dataclass(frozen=True)
class ReadText:
    """A text, and what the feed-forward layer reads at its tokens.

    Attributes:
        residual_TH: what the layer's output is added to.
    """

    tokens_T: NDArray[np.int32]
    inputs_TH: Float32
    residual_TH: Float32


def read_text(task: Any, texts: Sequence[str], num_tokens: int) -> ReadText:
    """Run the first blocks of a model that ends after BLOCK."""
    windows_WT = _windows(task, texts, num_tokens)
    layers = task.backbone.transformer_layers
    norm = layers[BLOCK]._feedforward_layernorm
    seen: list[tuple[Float32, Float32]] = []
    call = norm.call

    def call_and_record(inputs: Any) -> Any:
        outputs = call(inputs)
        rows = (np.asarray(array).reshape(-1, array.shape[-1]) for array in (outputs, inputs))
        seen.append((next(rows), next(rows)))
        return outputs

    norm.call = call_and_record
    try:
        for start in range(0, len(windows_WT), _BATCH):
            hidden = task.backbone.token_embedding(windows_WT[start : start + _BATCH])
            for layer in layers:
                hidden = layer(hidden)
    finally:
        norm.call = call
    inputs, residuals = zip(*seen, strict=True)
    return ReadText(windows_WT.reshape(-1), np.concatenate(inputs), np.concatenate(residuals))


def _windows(task: Any, texts: Sequence[str], num_tokens: int) -> NDArray[np.int32]:
    """Tokens of documents in a fixed random order, [windows, WINDOW]."""
    tokens: list[int] = []
    for place in np.random.default_rng(0).permutation(len(texts)):
        tokens += map(int, task.preprocessor.tokenizer(texts[place]))
        if len(tokens) >= num_tokens:
            break
    count = min(len(tokens), num_tokens) // WINDOW
    return np.asarray(tokens[: count * WINDOW], np.int32).reshape(count, WINDOW)


@dataclass(frozen=True)
class Mixture:
    """Experts, and the scores of each at tokens: [tokens, hidden] → [tokens, experts]."""

    experts: list[Expert]
    scores: Callable[[Float32], Float32]

    @classmethod
    def of(cls, layer: FeedForward, inputs_TH: Float32, seed: int) -> Mixture:
        """Cut a layer into experts.

        Args:
            inputs_TH: tokens that are clustered.
        """
        directions_TH = _directions(inputs_TH)
        rng = np.random.default_rng(seed)
        centres_EH = directions_TH[rng.choice(len(inputs_TH), NUM_EXPERTS, replace=False)]
        for _ in range(_KMEANS_STEPS):
            nearest_T = np.argmax(directions_TH @ centres_EH.T, 1)
            sums_EH = np.stack(
                [directions_TH[nearest_T == number].sum(0) for number in range(NUM_EXPERTS)]
            )
            centres_EH = _directions(sums_EH)
        nearest_T = np.argmax(directions_TH @ centres_EH.T, 1)
        size_I = np.linalg.norm(layer.down_HI, axis=0)
        experts = []
        for number in range(NUM_EXPERTS):
            rows_TH = inputs_TH[nearest_T == number]
            hidden_TI = activated(rows_TH @ layer.gate_IH.T, rows_TH @ layer.up_IH.T)
            energy_I = np.square(hidden_TI).mean(0) * size_I**2
            kept = np.sort(np.argsort(-energy_I, kind="stable")[:INTERMEDIATE])
            down_HI = np.ascontiguousarray(layer.down_HI[:, kept])
            experts.append(Expert(layer.gate_IH[kept], layer.up_IH[kept], down_HI))
        similar_TE = np.sort(directions_TH @ centres_EH.T, 1)
        # The first expert's logit is on average 1 above the second's, as trained routers' are.
        sharpness = 1 / float(np.mean(similar_TE[:, -1] - similar_TE[:, -2]))
        return cls(experts, lambda rows: sharpness * (_directions(rows) @ centres_EH.T))

    def route(self, inputs_TH: Float32) -> Routing:
        """The experts of tokens."""
        logits_TE = self.scores(inputs_TH)
        experts_TK = np.argsort(-logits_TE, 1, kind="stable")[:, :PER_TOKEN]
        share_TK = np.exp(np.take_along_axis(logits_TE, experts_TK, 1))
        weights_TK = np.asarray(share_TK / share_TK.sum(1, keepdims=True), np.float32)
        return Routing(experts_TK, weights_TK)


def _directions(rows: Float32) -> Float32:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
