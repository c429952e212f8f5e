"""What Hugging Face's transformers answers for the folders of `tiny_huggingface`.

An independent reference for what is read from such folders. It is stored, since neither
transformers nor PyTorch is needed to test; where both are installed,
`python -m tests.models.transformers_answers` computes it again (stored: transformers 5.24.0 on
PyTorch 2.13.0).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.models.tiny_huggingface import CONFIGS, tiny_huggingface

_STORED = Path(__file__).with_suffix(".json")

_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
# They take more than one text; what is read of them is compared with KerasHub's own loading alone.
_NOT_ASKED = {"bart", "gemma3", "gemma4", "paligemma", "qwen3_5"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in CONFIGS if family not in _NOT_ASKED},
    "gemma3 of 6 blocks": ("gemma3_text", {"num_hidden_layers": 6}),
    "gemma3 with scaled positions": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    ),
    "llama with a large epsilon": ("llama", {"rms_norm_eps": 1e-2}),
    "llama with scaled positions": ("llama", {"rope_scaling": _LLAMA3_ROPE}),
    "qwen2 with a head": ("qwen2", {"tie_word_embeddings": False}),
}
"""A family and changes of its config.json, by the name of the answer."""


def folder_of(name: str, path: Path) -> Path:
    """The folder that an answer is for."""
    family, changes = CASES[name]
    extra = {}
    if family == "roberta":  # zeros, as in every published one
        extra["roberta.embeddings.token_type_embeddings.weight"] = np.zeros((1, 32), np.float32)
    return tiny_huggingface(path, family, extra=extra, torch_dtype="float32", **changes)


def tokens() -> NDArray[np.int32]:
    """What the models are asked, [batch, sequence]."""
    return np.random.default_rng(3).integers(5, 119, (1, 24), dtype="int32")


def sampled(output: NDArray[Any]) -> NDArray[Any]:
    """The part of logits or hidden states, [batch, sequence, features], that is stored."""
    return output[0, ::8, ::16]


def stored_answer(name: str) -> NDArray[np.float64]:
    """The sampled answer of transformers."""
    return np.array(json.loads(_STORED.read_text(encoding="utf-8"))[name])


def _main() -> None:
    import torch
    import transformers  # type: ignore[import-not-found]

    answers = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = folder_of(name, Path(folder))
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            generates = config["architectures"][0].endswith(("ForCausalLM", "LMHeadModel"))
            kind = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
            output = kind.from_pretrained(path).eval()(torch.tensor(tokens(), dtype=torch.int64))
            found = output.logits if generates else output.last_hidden_state
            answers[name] = sampled(found.detach().numpy()).round(7).tolist()
    lines = (f"  {json.dumps(name)}: {json.dumps(answers[name])}" for name in sorted(answers))
    _STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
