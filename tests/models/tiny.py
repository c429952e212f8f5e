"""Tiny random KerasHub presets: every architecture, with tokenizer, preprocessor and task.

The weights are random but of realistic scale, so that attention attends, norms scale and logits
vary. The preset's bytes depend on the arguments alone. What KerasHub's `get_config` forgets is
added to the JSON afterwards, as its converters do for real checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from keras.src.backend.common import global_state
from keras.src.utils.naming import reset_uids

from tests.models.saved_preset import complete
from tests.models.tiny_tokenizers import TOKENIZERS

NUM_HEADS = 4
NUM_KEY_VALUE_HEADS = 2
MAX_SEQUENCE_LENGTH = 256

_GROUPED = ("num_query_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one of KerasHub's architectures is built.

    Attributes:
        task: name of the task class, such as "GPT2CausalLM".
        heads: names of the backbone's arguments that count heads: one, or queries and keys.
        options: the backbone's other arguments, as a function of the width.
        ties: whether the backbone takes `tie_word_embeddings`.
        preprocesses: whether its preprocessor works without TensorFlow; if not, the preset has a
            tokenizer and a task but no preprocessor.
    """

    task: str
    heads: tuple[str, ...] = ("num_heads",)
    options: Callable[[int], dict[str, Any]] = field(default=lambda hidden_dim: {})
    ties: bool = False
    preprocesses: bool = True


def _positions(hidden_dim: int) -> dict[str, Any]:
    return {"dropout": 0.0, "max_sequence_length": MAX_SEQUENCE_LENGTH}


def _head_dim(hidden_dim: int) -> dict[str, Any]:
    return {"head_dim": hidden_dim // NUM_HEADS}


def _gemma3(hidden_dim: int) -> dict[str, Any]:
    return {
        **_head_dim(hidden_dim),
        "image_size": 16,  # required even without a vision encoder
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": True,
        "sliding_window_size": 8,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "Bert": Architecture(task="BertMaskedLM", options=_positions),
    "Bloom": Architecture(task="BloomCausalLM"),
    "Falcon": Architecture(task="FalconCausalLM", heads=("num_attention_heads",)),
    "GPT2": Architecture(task="GPT2CausalLM", options=_positions),
    "GPTNeoX": Architecture(task="GPTNeoXCausalLM"),
    "Gemma": Architecture(task="GemmaCausalLM", heads=_GROUPED, options=_head_dim),
    "Gemma3": Architecture(
        task="Gemma3CausalLM", heads=_GROUPED, options=_gemma3, preprocesses=False
    ),
    "Llama3": Architecture(task="Llama3CausalLM", heads=_GROUPED, ties=True),
    "Mistral": Architecture(task="MistralCausalLM", heads=_GROUPED),
    "OPT": Architecture(task="OPTCausalLM", options=_positions),
    "Phi3": Architecture(task="Phi3CausalLM", heads=_GROUPED),
    "Qwen3": Architecture(task="Qwen3CausalLM", heads=_GROUPED, options=_head_dim, ties=True),
}


def tiny_preset(
    architecture: str,
    path: str | Path,
    *,
    dtype: str = "float32",
    tied: bool = True,
    num_blocks: int = 2,
    seed: int = 0,
    hidden_dim: int = 64,
    intermediate_dim: int = 128,
) -> Path:
    """Save a small random preset that `Task.from_preset` can load and generate with.

    Args:
        architecture: a key of ARCHITECTURES.
        path: the preset's folder; created if missing.
        dtype: of weights and computation: float32, float16 or bfloat16.
        tied: whether the head is the embedding's transpose, for the architectures that offer the
            choice (Llama3, Qwen3); ignored by the others.
        num_blocks: number of transformer blocks.
        seed: of the weights.
        hidden_dim: width; a multiple of 8, twice the number of heads.
        intermediate_dim: width of the feed-forward layers; Gemma halves it.

    Raises:
        KeyError: the architecture is unknown.
    """
    path = Path(path)
    kind = ARCHITECTURES[architecture]
    options = kind.options(hidden_dim)
    if kind.ties:
        options["tie_word_embeddings"] = tied
    # Keras numbers layers' names per process, and stores the names with the weights.
    reset_uids()
    tokenizer = TOKENIZERS[architecture]()
    with keras.StatelessScope(initialize_variables=False):  # initializers take most of the time
        backbone = getattr(keras_hub.models, f"{architecture}Backbone")(
            vocabulary_size=tokenizer.vocabulary_size(),
            num_layers=num_blocks,
            **dict(zip(kind.heads, (NUM_HEADS, NUM_KEY_VALUE_HEADS), strict=False)),
            hidden_dim=hidden_dim,
            intermediate_dim=intermediate_dim,
            dtype=dtype,
            name="backbone",
            **options,
        )
    # Otherwise the next scope would initialize them, even those that have a value by then.
    global_state.set_global_attribute("uninitialized_variables", [])
    preprocessor = None
    if kind.preprocesses:
        preprocessor = getattr(keras_hub.models, f"{kind.task}Preprocessor")(
            tokenizer=tokenizer, sequence_length=MAX_SEQUENCE_LENGTH, name="preprocessor"
        )
    task = getattr(keras_hub.models, kind.task)(
        backbone=backbone, preprocessor=preprocessor, name="task"
    )
    randomize(task, seed)
    task.save_to_preset(str(path))
    if preprocessor is None:
        tokenizer.save_to_preset(str(path))
    forgotten = {"tie_word_embeddings": tied} if kind.ties else {}
    complete(path, forgotten, origin={"architecture": architecture, "seed": seed})
    return path


def randomize(model: Any, seed: int) -> None:
    """Give every weight a value that depends only on the seed and the weight's index.

    Matrices preserve their inputs' variance, whichever axes they contract. Norms' scales lie around
    1 and biases around 0, but never exactly there, so that dropping one changes the output.
    """
    for index, weight in enumerate(model.weights):
        noise = np.random.default_rng([seed, index]).standard_normal(weight.shape, np.float32)
        if len(weight.shape) > 1:
            weight.assign(noise * (np.prod(weight.shape) / max(weight.shape)) ** -0.5)
        else:
            weight.assign(0.1 * noise + weight.path.endswith(("gamma", "scale")))
