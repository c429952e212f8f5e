"""Hugging Face folders of large published shapes, whose weights are holes in sparse files.

    python -m tests.models.large_shapes llama-3-8b FOLDER

They take a few kilobytes of disk and can be planned, which reads where tensors lie and none of
their values; never quantized.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models.tiny_huggingface import CONFIGS, tensor_shapes, write_json

_LLAMA: dict[str, Any] = {
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
_SPECIAL = ("begin_of_text", "end_of_text", "eot_id", "start_header_id", "end_header_id")
SHAPES = {"llama-3-8b": _LLAMA, "llama-3-70b": _LLAMA_70B}
"""By name: what a config says otherwise than that of the tiny Llama."""


def _write_byte_pairs(path: Path) -> None:
    """A tokenizer of single bytes, which cuts a text into more tokens than a real one would."""
    special = [f"<|{name}|>" for name in _SPECIAL]
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


def large_folder(path: str | Path, name: str) -> Path:
    """Write a folder of one of SHAPES."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = CONFIGS["llama"] | SHAPES[name]
    write_json(path / "config.json", config)
    _write_byte_pairs(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in sorted(tensor_shapes(config).items()):
        start = end
        numbers = 1
        for size in shape:
            numbers *= size
        end += 2 * numbers
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    print(f"ready: {large_folder(given.folder, given.name)}")


if __name__ == "__main__":
    main()
