"""A real language model without a download: SmolLM2-135M-Instruct as a KerasHub preset.

    python -m tests.models.smollm2 FOLDER [--dither] [--dtype float16]

`smollm2_weights` says where the weights come from and what must not be concluded from them.
"""

from __future__ import annotations

import argparse
from operator import attrgetter
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from keras.src.backend.common import global_state

from tests.models.saved_preset import complete, made_from
from tests.models.smollm2_weights import CONTROL_TOKEN, FILE_SHA256, Checkpoint, read_checkpoint
from tests.models.texts import evaluation_documents

BLOCK_WEIGHTS = {
    "attn_norm": "_self_attention_layernorm.scale",
    "attn_q": "_self_attention_layer._query_dense.kernel",
    "attn_k": "_self_attention_layer._key_dense.kernel",
    "attn_v": "_self_attention_layer._value_dense.kernel",
    "attn_output": "_self_attention_layer._output_dense.kernel",
    "ffn_norm": "_feedforward_layernorm.scale",
    "ffn_gate": "_feedforward_gate_dense.kernel",
    "ffn_up": "_feedforward_intermediate_dense.kernel",
    "ffn_down": "_feedforward_output_dense.kernel",
}
"""The attribute of a block for each GGUF weight blk.<block>.<name>."""


def smollm2_preset(
    path: str | Path,
    *,
    dither: bool = False,
    dtype: str = "float32",
    num_blocks: int | None = None,
) -> Path:
    """Write the model as a `Llama3CausalLM` preset, unless it is there already.

    Args:
        path: the preset's folder.
        dither: spread the weights over their 4-bit cells.
        dtype: of the stored weights: float32, float16 or bfloat16.
        num_blocks: how many of the first blocks to keep (a model of few does not write English);
            all 30 if None.

    Raises:
        FileExistsError: the folder holds another preset.
    """
    path = Path(path)
    origin = {
        "gguf_sha256": FILE_SHA256,
        "dither": dither,
        "dtype": dtype,
        "num_blocks": num_blocks,
    }
    if made_from(path) == origin:
        return path
    if made_from(path) is not None:
        raise FileExistsError(f"{path} holds a preset made from {made_from(path)}; remove it")
    checkpoint = read_checkpoint(dither=dither, num_blocks=num_blocks)
    backbone = _backbone(checkpoint, dtype)
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(
        _tokenizer(checkpoint.metadata), sequence_length=512, add_start_token=False
    )
    task = keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=preprocessor)
    task.save_to_preset(str(path))
    complete(path, {"tie_word_embeddings": True}, origin)
    return path


def _backbone(checkpoint: Checkpoint, dtype: str) -> Any:
    metadata = checkpoint.metadata
    with keras.StatelessScope(initialize_variables=False):
        backbone = keras_hub.models.Llama3Backbone(
            vocabulary_size=metadata["llama.vocab_size"],
            num_layers=metadata["llama.block_count"],
            num_query_heads=metadata["llama.attention.head_count"],
            num_key_value_heads=metadata["llama.attention.head_count_kv"],
            hidden_dim=metadata["llama.embedding_length"],
            intermediate_dim=metadata["llama.feed_forward_length"],
            rope_max_wavelength=metadata["llama.rope.freq_base"],
            layer_norm_epsilon=1e-5,  # stored as the float32 next to it
            tie_word_embeddings=True,
            dtype=dtype,
        )
    # Otherwise the next scope would initialize them, even those that have a value by then.
    global_state.set_global_attribute("uninitialized_variables", [])
    variables = {
        "token_embd.weight": backbone.token_embedding.embeddings,
        "output_norm.weight": backbone.layer_norm.scale,
    }
    for index, block in enumerate(backbone.transformer_layers):
        for name, attribute in BLOCK_WEIGHTS.items():
            variables[f"blk.{index}.{name}.weight"] = attrgetter(attribute)(block)
    if variables.keys() != checkpoint.weights.keys():
        raise ValueError(f"unmatched: {sorted(variables.keys() ^ checkpoint.weights.keys())}")
    for name, variable in variables.items():
        weight = checkpoint.weights[name]
        if name.startswith("blk.") and weight.ndim == 2:  # a kernel's in_features come first
            weight = weight.T.reshape(variable.shape)
        variable.assign(weight)
    return backbone


def _tokenizer(metadata: dict[str, Any]) -> Any:
    """Return byte-level BPE with SmolLM2's special tokens.

    Llama3Tokenizer forgets special tokens other than Llama 3's. Qwen3Tokenizer is the same code
    with SmolLM2's: no start token, <|im_end|> as end and <|endoftext|> as padding.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    return keras_hub.models.Qwen3Tokenizer(
        vocabulary={token: index for index, token in enumerate(tokens)},
        merges=metadata["tokenizer.ggml.merges"],
        unsplittable_tokens=[
            t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN
        ],
        name="smollm2_tokenizer",
    )


def perplexity(task: Any, documents: list[str], num_tokens: int = 512) -> float:
    """Perplexity of a task on the documents' first tokens."""
    token_ids = [int(token) for text in documents for token in task.preprocessor.tokenizer(text)]
    tokens = np.asarray(token_ids[:num_tokens], np.int32)[None]
    logits = task({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    losses = keras.ops.sparse_categorical_crossentropy(
        tokens[:, 1:], keras.ops.cast(logits[:, :-1], "float32"), from_logits=True
    )
    return float(np.exp(np.mean(np.asarray(losses))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write the preset")
    parser.add_argument("--dither", action="store_true", help="spread weights over their cells")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    preset = smollm2_preset(arguments.folder, dither=arguments.dither, dtype=arguments.dtype)
    task = keras_hub.models.CausalLM.from_preset(str(preset), dtype="float32")
    task.compile(sampler="greedy")
    print(f"perplexity of Python's manual: {perplexity(task, evaluation_documents()):.2f}")
    print(task.generate("The capital of France is", max_length=24))


if __name__ == "__main__":
    main()
