"""What transformers' config.json says of the tiny mixtures of experts of `tests.families`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 288,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {
        **_COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 64,
        "num_local_experts": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": 512,
    },
    "Qwen3Moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "num_experts": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "sliding_window": 32768,
        "use_sliding_window": True,
        "max_window_layers": 2,
    },
}


def config_folder(family: str, folder: Path) -> Path:
    """A folder to name with --like."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    return folder
