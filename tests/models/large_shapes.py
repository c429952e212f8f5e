"""Hugging Face folders of large published shapes, whose weights are holes in sparse files.

    python -m tests.models.large_shapes llama-3-8b FOLDER

They take a few kilobytes of disk and can be planned, which reads where tensors lie and none of
their values. What is to be quantized too is filled with random weights, and made of fewer blocks.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models import expert_configs
from tests.models.tiny_huggingface import CONFIGS, random_tensor, tensor_shapes, write_json
from tests.models.tiny_tokenizers import TOKENIZERS

_LLAMA: dict[str, Any] = CONFIGS["llama"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_LLAMA_70B = _LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_SPECIAL = {
    "llama": ("begin_of_text", "end_of_text", "eot_id", "start_header_id", "end_header_id"),
    "qwen3_moe": ("endoftext", "im_start", "im_end"),
}
_MIXTRAL = expert_configs.CONFIGS["Mixtral"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
_QWEN3_30B = expert_configs.CONFIGS["Qwen3Moe"] | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "sliding_window": None,
}
_QWEN3_235B = _QWEN3_30B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
SHAPES = {
    "llama-3-8b": _LLAMA,
    "llama-3-70b": _LLAMA_70B,
    "mixtral-8x7b": _MIXTRAL,
    "qwen3-30b-a3b": _QWEN3_30B,
    "qwen3-235b-a22b": _QWEN3_235B,
}
"""Configs by name."""


def _write_tokenizer(path: Path, family: str) -> None:
    """A tokenizer of bytes or letters, which cuts a text into more tokens than a real one would."""
    if family not in _SPECIAL:
        TOKENIZERS["Mistral"]().save_assets(str(path))
        (path / "vocabulary.spm").rename(path / "tokenizer.model")
        return
    special = [f"<|{name}|>" for name in _SPECIAL[family]]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    built = Tokenizer(models.BPE(vocab={x: n for n, x in enumerate(pieces)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    built.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
        },
    )


def large_folder(path: str | Path, name: str, *, filled: bool = False, **changes: Any) -> Path:
    """Write a folder of one of SHAPES.

    Args:
        filled: with random weights, one tensor at a time.
        changes: keys of config.json to set.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name] | changes
    write_json(path / "config.json", config)
    _write_tokenizer(path, config["model_type"])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = sorted(_tensor_shapes(config).items())
    for tensor, shape in shapes:
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if filled:
            for index, (tensor, shape) in enumerate(shapes):
                file.write(random_tensor(index, tensor, shape).astype(ml_dtypes.bfloat16).tobytes())
        file.truncate(8 + len(text) + end)
    return path


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """As published checkpoints have them, with a matrix for each expert."""
    if config["model_type"] not in _EXPERTS:
        return tensor_shapes(config)
    module, router, number, size, (gate, up, down) = _EXPERTS[config["model_type"]]
    hidden, inner, experts = config["hidden_size"], config[size], config[number]
    # Attention and norms are Qwen 3's, whose heads have norms, or Llama's.
    dense = config | {"model_type": "qwen3" if "head_dim" in config else "llama"}
    shapes = {x: y for x, y in tensor_shapes(dense).items() if ".mlp." not in x}
    for block in range(config["num_hidden_layers"]):
        layer = f"model.layers.{block}.{module}"
        shapes[f"{layer}.{router}.weight"] = (experts, hidden)
        for expert in range(experts):
            one = f"{layer}.experts.{expert}"
            shapes |= {f"{one}.{name}.weight": (inner, hidden) for name in (gate, up)}
            shapes[f"{one}.{down}.weight"] = (hidden, inner)
    return shapes


_EXPERTS = {
    "mixtral": (
        "block_sparse_moe",
        "gate",
        "num_local_experts",
        "intermediate_size",
        ("w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        "mlp",
        "gate",
        "num_experts",
        "moe_intermediate_size",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}
"""By family: where experts are, their router, the config's keys for their number and size, and
their matrices."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(f"ready: {large_folder(given.folder, given.name)}")


if __name__ == "__main__":
    main()
