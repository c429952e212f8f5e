"""llm-compressor's GPTQ on one job of `quality.peers`; runs in an environment of its own.

    python -P peer_llmcompressor.py JOB.json

JOB.json: model, tokens (.npy, [windows, length]), bits, group_size, options, output.
"""

# mypy: disable-error-code="import-not-found"
# The environment of the tests has none of these packages.

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokens = np.load(job["tokens"]).tolist()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in tokens]
    options = job["options"]
    weights = {
        "num_bits": job["bits"],
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": job["group_size"],
        **{k: v for k, v in options.items() if k in QuantizationArgs.model_fields},
    }
    # Everything else is its default, which is activation order with static groups.
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        **{k: v for k, v in options.items() if k not in QuantizationArgs.model_fields},
    )
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    save_file(_effective_weights(model), job["output"])
    print(json.dumps({"seconds": seconds}))


def _effective_weights(model: Any) -> dict[str, torch.Tensor]:
    """What each quantized layer multiplies by, [out_features, in_features]."""
    with torch.inference_mode():
        return {
            f"{name}.weight": layer(torch.eye(layer.in_features)).T.float().contiguous()
            for name, layer in model.model.layers.named_modules(prefix="model.layers")
            if isinstance(layer, torch.nn.Linear)
        }


if __name__ == "__main__":
    main()
