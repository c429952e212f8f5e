"""Tiny configs of Gemma 4 and Qwen3.5 with encoders of images, and the tensors that they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]

QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [1, 0, 0],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
"""As published, but for sizes."""

GEMMA4: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 258881,
    "boi_token_id": 255999,
    "dtype": "bfloat16",
    "eoi_token_id": 258882,
    "eos_token_id": [1, 106],
    "image_token_id": 258880,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 16,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "hidden_size_per_layer_input": 8,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 320,
    },
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0",
    "video_token_id": 258884,
    "vision_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "default_output_length": 280,
        "dtype": "bfloat16",
        "global_head_dim": 8,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": False,
        "use_clipped_linears": True,
    },
    "vision_soft_tokens_per_image": 280,
}
"""With inputs for every layer, and layers that share keys and values, as the smallest have."""


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def qwen3_5(config: Mapping[str, Any]) -> Shapes:
    text, vision = config["text_config"], config["vision_config"]
    hidden, inner, head_dim = (text[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (text[f"num_{k}_heads"] * head_dim for k in ("attention", "key_value"))
    key_dim = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value_heads = text["linear_num_value_heads"]
    value_dim = value_heads * text["linear_value_head_dim"]
    mixed = 2 * key_dim + value_dim
    shapes: Shapes = {
        "model.language_model.embed_tokens.weight": (text["vocab_size"], hidden),
        "model.language_model.norm.weight": (hidden,),
        "mtp.fc.weight": (hidden, 2 * hidden),
    }
    for index, kind in enumerate(text["layer_types"]):
        block = f"model.language_model.layers.{index}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
        }
        if kind == "full_attention":
            shapes |= {
                f"{block}.self_attn.q_proj.weight": (2 * queries, hidden),  # and gates
                f"{block}.self_attn.k_proj.weight": (keys, hidden),
                f"{block}.self_attn.v_proj.weight": (keys, hidden),
                f"{block}.self_attn.o_proj.weight": (hidden, queries),
                f"{block}.self_attn.q_norm.weight": (head_dim,),
                f"{block}.self_attn.k_norm.weight": (head_dim,),
            }
        else:
            shapes |= {
                f"{block}.linear_attn.in_proj_qkv.weight": (mixed, hidden),
                f"{block}.linear_attn.in_proj_z.weight": (value_dim, hidden),
                f"{block}.linear_attn.in_proj_b.weight": (value_heads, hidden),
                f"{block}.linear_attn.in_proj_a.weight": (value_heads, hidden),
                f"{block}.linear_attn.conv1d.weight": (mixed, 1, text["linear_conv_kernel_dim"]),
                f"{block}.linear_attn.dt_bias": (value_heads,),
                f"{block}.linear_attn.A_log": (value_heads,),
                f"{block}.linear_attn.norm.weight": (text["linear_value_head_dim"],),
                f"{block}.linear_attn.out_proj.weight": (hidden, value_dim),
            }
    width, patch = vision["hidden_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    shapes |= {
        "model.visual.patch_embed.proj.weight": (
            width,
            3,
            vision["temporal_patch_size"],
            patch,
            patch,
        ),
        "model.visual.patch_embed.proj.bias": (width,),
        "model.visual.pos_embed.weight": (vision["num_position_embeddings"], width),
        **_norm("model.visual.merger.norm", width),
        **_linear("model.visual.merger.linear_fc1", merged, merged),
        **_linear("model.visual.merger.linear_fc2", vision["out_hidden_size"], merged),
    }
    for index in range(vision["depth"]):
        block = f"model.visual.blocks.{index}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.linear_fc1", vision["intermediate_size"], width)
        shapes |= _linear(f"{block}.mlp.linear_fc2", width, vision["intermediate_size"])
    return shapes


def gemma4(config: Mapping[str, Any]) -> Shapes:
    text, vision = config["text_config"], config["vision_config"]
    hidden, num_blocks = text["hidden_size"], text["num_hidden_layers"]
    beside = text["hidden_size_per_layer_input"]
    model = "model.language_model"
    shapes: Shapes = {
        f"{model}.embed_tokens.weight": (text["vocab_size"], hidden),
        f"{model}.embed_tokens_per_layer.weight": (
            text["vocab_size_per_layer_input"],
            num_blocks * beside,
        ),
        f"{model}.norm.weight": (hidden,),
        f"{model}.per_layer_model_projection.weight": (num_blocks * beside, hidden),
        f"{model}.per_layer_projection_norm.weight": (beside,),
    }
    for index, kind in enumerate(text["layer_types"]):
        block = f"{model}.layers.{index}"
        is_shared = index >= num_blocks - text["num_kv_shared_layers"]
        head_dim = text["head_dim" if kind == "sliding_attention" else "global_head_dim"]
        inner = text["intermediate_size"] * (2 if is_shared else 1)
        shapes |= _gemma4_block(
            block, hidden, text["num_attention_heads"] * head_dim, head_dim, inner
        )
        if text["enable_moe_block"]:
            shapes |= _gemma4_experts(
                block, hidden, text["num_experts"], text["moe_intermediate_size"]
            )
        if not is_shared:
            keys = (text["num_key_value_heads"] * head_dim, hidden)
            shapes |= {f"{block}.self_attn.{name}_proj.weight": keys for name in "kv"}
            shapes[f"{block}.self_attn.k_norm.weight"] = (head_dim,)
        shapes |= {
            f"{block}.layer_scalar": (1,),
            f"{block}.per_layer_input_gate.weight": (beside, hidden),
            f"{block}.per_layer_projection.weight": (hidden, beside),
            f"{block}.post_per_layer_input_norm.weight": (hidden,),
        }
    width, patch = vision["hidden_size"], vision["patch_size"]
    tower = "model.vision_tower"
    shapes |= {
        "model.embed_vision.embedding_projection.weight": (hidden, width),
        f"{tower}.patch_embedder.input_proj.weight": (width, 3 * patch**2),
        f"{tower}.patch_embedder.position_embedding_table": (
            2,
            vision["position_embedding_size"],
            width,
        ),
    }
    for index in range(vision["num_hidden_layers"]):
        block = f"{tower}.encoder.layers.{index}"
        own = _gemma4_block(block, width, width, vision["head_dim"], vision["intermediate_size"])
        own |= {f"{block}.self_attn.{name}_proj.weight": (width, width) for name in "kv"}
        own[f"{block}.self_attn.k_norm.weight"] = (vision["head_dim"],)
        for name, shape in own.items():
            if "_proj." not in name:
                shapes[name] = shape
                continue
            layer = name.removesuffix(".weight")
            shapes[f"{layer}.linear.weight"] = shape
            shapes |= {f"{layer}.{end}put_{most}": () for end in ("in", "out") for most in _MOST}
    return shapes


_MOST = ("min", "max")


def _gemma4_block(block: str, hidden: int, queries: int, head_dim: int, inner: int) -> Shapes:
    parts = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {f"{block}.{part}_layernorm.weight": (hidden,) for part in parts} | {
        f"{block}.self_attn.q_proj.weight": (queries, hidden),
        f"{block}.self_attn.o_proj.weight": (hidden, queries),
        f"{block}.self_attn.q_norm.weight": (head_dim,),
        f"{block}.mlp.gate_proj.weight": (inner, hidden),
        f"{block}.mlp.up_proj.weight": (inner, hidden),
        f"{block}.mlp.down_proj.weight": (hidden, inner),
    }


def _gemma4_experts(block: str, hidden: int, num_experts: int, inner: int) -> Shapes:
    norms = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2")
    return {f"{block}.{n}.weight": (hidden,) for n in (*norms, "post_feedforward_layernorm_2")} | {
        f"{block}.experts.down_proj": (num_experts, hidden, inner),
        f"{block}.experts.gate_up_proj": (num_experts, 2 * inner, hidden),
        f"{block}.router.per_expert_scale": (num_experts,),
        f"{block}.router.proj.weight": (num_experts, hidden),
        f"{block}.router.scale": (hidden,),
    }
