"""SmolLM2-135M-Instruct as a Hugging Face directory, with the weights of `smollm2`'s preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models.smollm2_weights import CONTROL_TOKEN, Checkpoint, read_checkpoint

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Hugging Face's name below model.layers.<block> for each GGUF name below blk.<block>."""


def smollm2_directory(
    path: str | Path, *, dither: bool = False, num_blocks: int | None = None
) -> Path:
    """Write config, tokenizer and float32 weights as `transformers` reads them."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(dither=dither, num_blocks=num_blocks)
    _write(path / "config.json", _config(checkpoint.metadata))
    _tokenizer(checkpoint.metadata).save(str(path / "tokenizer.json"))
    _write(path / "tokenizer_config.json", _tokenizer_config(checkpoint.metadata))
    # transformers requires this metadata entry.
    save_file(_weights(checkpoint), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for index in range(checkpoint.metadata["llama.block_count"]):
        for theirs, name in LAYER_NAMES.items():
            names[f"blk.{index}.{theirs}"] = f"model.layers.{index}.{name}"
    return {
        f"{names[name.removesuffix('.weight')]}.weight": weight
        for name, weight in checkpoint.weights.items()
    }


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,  # stored as the float32 next to it
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": metadata["llama.vocab_size"],
    }


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp calls this pre-tokenizer "smollm".
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "add_prefix_space": False,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            f"{name}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
            for name, theirs in special.items()
        },
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
