"""Models of Llama's shape for checks of GPUs: as Hugging Face stores them, with random weights."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# KerasHub asks for the last, too.
_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ      ", np.uint8)
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes.

    Attributes:
        hidden, inner: features between the blocks, and of the feed-forward layers.
    """

    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    blocks: int

    def config(self, vocabulary: int) -> dict[str, Any]:
        """config.json, in bfloat16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "max_position_embeddings": 131072,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 256,
            "eos_token_id": 257,
        }

    def tensors(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        values = self.hidden // self.heads * self.key_value_heads
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for index in range(self.blocks):
            of_block = {
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (values, self.hidden),
                "self_attn.v_proj": (values, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "mlp.gate_proj": (self.inner, self.hidden),
                "mlp.up_proj": (self.inner, self.hidden),
                "mlp.down_proj": (self.hidden, self.inner),
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
            }
            found |= {f"model.layers.{index}.{n}.weight": shape for n, shape in of_block.items()}
        return found


LLAMA_8B = Shape(hidden=4096, inner=14336, heads=32, key_value_heads=8, blocks=2)
"""Two of the 32 blocks of Llama 3.1 8B."""
# As wide within as between its layers: half as many programs to compile.
TINY = Shape(hidden=64, inner=64, heads=4, key_value_heads=2, blocks=2)


def write_model(folder: Path, shape: Shape) -> None:
    """Write the model, with a tokenizer whose tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = 256 + len(_SPECIAL)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(x, special=True) for x in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token"), _SPECIAL, strict=False))
    for name, content in {
        "config.json": shape.config(vocabulary),
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    tensors = shape.tensors(vocabulary)
    with ThreadPoolExecutor(_THREADS) as pool:
        values = pool.map(_random, range(len(tensors)), tensors.values())
        found = dict(zip(tensors, values, strict=True))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def _random(seed: int, shape: tuple[int, ...]) -> NDArray[Any]:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    noise = np.random.default_rng([20, seed]).standard_normal(shape, np.float32)
    noise *= np.float32(shape[-1] ** -0.5)
    return noise.astype(ml_dtypes.bfloat16)


def write_text(file: Path, num_tokens: int) -> None:
    """Write a text of so many random tokens."""
    chosen = np.random.default_rng(20).choice(_LETTERS, num_tokens)
    file.write_bytes(chosen.tobytes())
