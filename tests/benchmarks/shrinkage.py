"""How far to trust correlations in calibration: errors of layers on text not solved on.

    python -m tests.benchmarks.shrinkage WORK --windows 16

SmolLM2's layers, calibrated on Python's manual with more or less damping, and with correlations of
inputs that count for more or less, judged on other documents of the manual, on novels and on code.
Inputs are those of the float model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from quantizer import GPTQScheme, HessianSum, solve
from quantizer.keras_format.kernel_layout import einsum_layout
from tests.models.smollm2 import smollm2_preset
from tests.models.texts import calibration_documents, code, evaluation_documents, novels

LENGTH = 512
_BATCH = 4
_ROWS = 512
"""Output channels of each matrix that are solved: enough for a mean."""

CANDIDATES: dict[str, dict[str, float]] = {
    "damping 0.01": {},
    "damping 0.1": {"hessian_damping": 0.1},
    "damping 0.3": {"hessian_damping": 0.3},
    "damping 1": {"hessian_damping": 1.0},
    "shrinkage 1": {"correlation_shrinkage": 1.0},
    "shrinkage 2": {"correlation_shrinkage": 2.0},
    "shrinkage 4": {"correlation_shrinkage": 4.0},
    "shrinkage 1, damping 0.1": {"correlation_shrinkage": 1.0, "hessian_damping": 0.1},
}


@dataclass(frozen=True)
class Seen:
    """A matrix, [out_features, in_features], and what it reads of each text."""

    weight_RC: NDArray[np.float32]
    inputs: dict[str, HessianSum]

    def error(self, restored_RC: NDArray[np.float32], text: str) -> float:
        """Of the output's energy on this text, the share that is error."""
        gram_CC = np.asarray(self.inputs[text].gram_CC, np.float64)
        missing_RC = (self.weight_RC - restored_RC).astype(np.float64)
        lost = np.sum((missing_RC @ gram_CC) * missing_RC)
        return float(lost / np.sum((self.weight_RC @ gram_CC) * self.weight_RC))


def windows(documents: Sequence[str], tokenizer: Any, number: int) -> NDArray[np.int32]:
    """Windows of documents in a random order, joined and cut, [number, LENGTH]."""
    tokens: list[int] = []
    for place in np.random.default_rng(0).permutation(len(documents)):
        if len(tokens) >= number * LENGTH:
            break
        tokens.extend(int(token) for token in tokenizer(documents[place]))
    if len(tokens) < number * LENGTH:
        raise SystemExit(f"only {len(tokens) // LENGTH} windows of {number}; ask for fewer")
    return np.asarray(tokens[: number * LENGTH], np.int32).reshape(number, LENGTH)


def record(
    task: keras.Model, texts: dict[str, NDArray[np.int32]], blocks: Sequence[int]
) -> list[Seen]:
    """What the layers of these blocks read."""
    layers = task.backbone.transformer_layers
    chosen = [
        layer
        for block in blocks
        for layer in (
            layers[block]._self_attention_layer._query_dense,
            layers[block]._self_attention_layer._output_dense,
            layers[block]._feedforward_gate_dense,
            layers[block]._feedforward_output_dense,
        )
    ]
    found = [Seen(_matrix(layer), {}) for layer in chosen]
    reading = ""
    for layer, seen in zip(chosen, found, strict=True):
        call = layer.call

        def note(
            inputs: Any,
            *args: Any,
            call: Callable[..., Any] = call,
            seen: Seen = seen,
            **named: Any,
        ) -> Any:
            rows = HessianSum.of(np.reshape(inputs, (-1, seen.weight_RC.shape[1])))
            before = seen.inputs.get(reading)
            seen.inputs[reading] = rows if before is None else before.merge(rows)
            return call(inputs, *args, **named)

        layer.call = note
    for text, tokens_WT in texts.items():
        reading = text
        for batch in _batches(tokens_WT):
            hidden = task.backbone.token_embedding(batch)
            for layer in layers[: max(blocks) + 1]:
                hidden = layer(hidden)
    return found


def _batches(tokens_WT: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
    yield from (tokens_WT[a : a + _BATCH] for a in range(0, len(tokens_WT), _BATCH))


def _matrix(layer: Any) -> NDArray[np.float32]:
    kernel = np.asarray(layer.kernel)
    if isinstance(layer, keras.layers.EinsumDense):
        return einsum_layout(layer.equation, kernel.shape).to_matrix(kernel)[:_ROWS]
    return np.ascontiguousarray(kernel.T)[:_ROWS]


def errors(matrices: Sequence[Seen], scheme: GPTQScheme) -> dict[str, NDArray[np.float64]]:
    """By text, of each matrix."""
    restored = [
        solve(one.weight_RC, one.inputs["calibration"], scheme).weight.dequantize()
        for one in matrices
    ]
    return {
        text: np.array([m.error(r, text) for m, r in zip(matrices, restored, strict=True)])
        for text in matrices[0].inputs
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.shrinkage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", type=Path, help="for the model, and for packages with texts")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--held-out", type=int, default=16, help="windows of each other text")
    parser.add_argument("--blocks", type=int, nargs="+", default=(1, 7))
    parser.add_argument("--bits", type=int, default=3, choices=(2, 3, 4, 8))
    arguments = parser.parse_args()
    preset = smollm2_preset(arguments.work / "preset", dither=True)
    task = keras_hub.models.CausalLM.from_preset(str(preset))
    documents = {
        "calibration": calibration_documents(),
        "manual": evaluation_documents(),
        "novels": novels(arguments.work),
        "code": code(arguments.work),
    }
    counts = dict.fromkeys(documents, arguments.held_out) | {"calibration": arguments.windows}
    texts = {
        name: windows(of_text, task.preprocessor.tokenizer, counts[name])
        for name, of_text in documents.items()
    }
    matrices = record(task, texts, arguments.blocks)
    scheme = GPTQScheme(
        weight_bits=arguments.bits, group_size=64, activation_order=True, refinement_sweeps=2
    )
    found = {name: errors(matrices, replace(scheme, **given)) for name, given in CANDIDATES.items()}
    table = Table(title="error of layers' outputs, as a multiple of damping 0.01's")
    table.add_column("")
    for name in documents:
        table.add_column(name, justify="right")
    plain = next(iter(found.values()))
    for name, by_text in found.items():
        ratios = [np.exp(np.mean(np.log(by_text[text] / plain[text]))) for text in documents]
        table.add_row(name, *(f"{ratio:.3f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
