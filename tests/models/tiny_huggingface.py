"""Tiny random Hugging Face folders: config.json, safetensors and a tokenizer, of many families.

Configs have the keys of published models, with their values but for sizes. Names and shapes of
tensors are those that transformers saves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.models.tiny_huggingface_seeing import GEMMA4, QWEN3_5, gemma4, qwen3_5
from tests.models.tiny_tokenizers import TOKENIZERS

HIDDEN, INNER, HEADS, KEY_VALUE_HEADS, HEAD_DIM, BLOCKS, POSITIONS = 32, 64, 4, 2, 8, 2, 64

_DECODER = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 4096,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
}
_QWEN = _DECODER | {
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_GEMMA = {key: value for key, value in _DECODER.items() if key != "tie_word_embeddings"} | {
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}
_ENCODER = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": BLOCKS,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
    "type_vocab_size": 2,
    "use_cache": True,
}
_ROBERTA = _ENCODER | {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": POSITIONS + 2,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}

_VISION = {
    "hidden_size": 16,
    "image_size": 16,
    "intermediate_size": 24,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "vision_use_head": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER
    | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": None,
    },
    "mistral": _DECODER
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 4096,
    },
    "qwen2": _QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 2 * HEAD_DIM,
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
    },
    "gemma": _GEMMA | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "model_type": "gemma2",
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 4096,
    },
    "gemma3_text": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": HEAD_DIM,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 1,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "model_type": "gemma3_text",
            "num_attention_heads": 2,
            "num_hidden_layers": BLOCKS,
            "num_key_value_heads": 1,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": _VISION,
    },
    "paligemma": {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": HIDDEN,
        "ignore_index": -100,
        "image_token_index": 320,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": HIDDEN,
        "text_config": {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "model_type": "gemma",
            "num_attention_heads": HEADS,
            "num_hidden_layers": BLOCKS,
            # As wide as a head in published ones, and KerasHub takes it for that.
            "num_image_tokens": HEAD_DIM,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
        },
        "torch_dtype": "float32",
        "transformers_version": "4.41.0.dev0",
        "vision_config": _VISION
        | {
            "num_image_tokens": 16,
            "projection_dim": HIDDEN,
            "projector_hidden_act": "gelu_fast",
        },
    },
    "gemma4": GEMMA4,
    "qwen3_5": QWEN3_5,
    "bart": {
        "activation_dropout": 0.1,
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "architectures": ["BartForConditionalGeneration"],
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "classif_dropout": 0.1,
        "classifier_dropout": 0.0,
        "d_model": HIDDEN,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": INNER,
        "decoder_layerdrop": 0.0,
        "decoder_layers": BLOCKS,
        "decoder_start_token_id": 2,
        "dropout": 0.1,
        "early_stopping": True,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": INNER,
        "encoder_layerdrop": 0.0,
        "encoder_layers": BLOCKS,
        "eos_token_id": 2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "gradient_checkpointing": False,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_position_embeddings": POSITIONS,
        "model_type": "bart",
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "normalize_embedding": True,
        "num_beams": 4,
        "num_hidden_layers": BLOCKS,
        "pad_token_id": 1,
        "scale_embedding": False,
        "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0",
        "use_cache": True,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 0,
        "embd_pdrop": 0.1,
        "eos_token_id": 0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_ctx": POSITIONS,
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_inner": None,
        "n_layer": BLOCKS,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "bert": _ENCODER
    | {"architectures": ["BertModel"], "classifier_dropout": None, "model_type": "bert"},
    "roberta": _ROBERTA | {"architectures": ["RobertaForMaskedLM"], "model_type": "roberta"},
    "xlm-roberta": _ROBERTA
    | {
        "architectures": ["XLMRobertaModel"],
        "classifier_dropout": None,
        "model_type": "xlm-roberta",
        "output_past": True,
    },
    "distilbert": {
        "activation": "gelu",
        "architectures": ["DistilBertForMaskedLM"],
        "attention_dropout": 0.1,
        "dim": HIDDEN,
        "dropout": 0.1,
        "hidden_dim": INNER,
        "initializer_range": 0.02,
        "max_position_embeddings": POSITIONS,
        "model_type": "distilbert",
        "n_heads": HEADS,
        "n_layers": BLOCKS,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "transformers_version": "4.10.0",
    },
    "albert": _ENCODER
    | {
        "architectures": ["AlbertForMaskedLM"],
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 16,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "inner_group_num": 1,
        "model_type": "albert",
        "net_structure_type": 0,
        "num_hidden_groups": 1,
        "num_memory_blocks": 0,
    },
}
"""A config.json of each family, without vocab_size."""

_TOKENIZERS = {
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3_text": "Gemma3",
    "gemma3": "Gemma3Vision",
    "paligemma": "PaliGemma",
    "bart": "Bart",
    "bert": "Bert",
    "distilbert": "Bert",
}


_IMAGES = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "size": {"height": 16, "width": 16},
}


def tiny_huggingface(
    path: str | Path,
    family: str,
    *,
    dtype: Any = None,
    tokenizer: bool = False,
    extra: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder of a family of CONFIGS.

    Args:
        dtype: of the tensors; the config's own if None.
        tokenizer: whether to write vocabularies too, for the families that have one here.
        extra: tensors to add, or to replace.
        changes: keys of config.json to set; None removes one.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(path, family) if tokenizer else 320
    config = CONFIGS[family] | changes
    if "text_config" in config:
        config["text_config"] = {"vocab_size": vocabulary, **config["text_config"]}
    else:
        config |= {"vocab_size": vocabulary} if tokenizer or "vocab_size" not in changes else {}
    if "vision_config" in config:
        write_json(path / "preprocessor_config.json", _IMAGES)
    if family == "paligemma":
        config |= {"image_token_index": vocabulary}
    config = {key: value for key, value in config.items() if changes.get(key, value) is not None}
    write_json(path / "config.json", config)
    wanted = np.dtype(
        dtype or {"bfloat16": ml_dtypes.bfloat16}.get(config.get("torch_dtype"), "f4")
    )
    tensors = {
        name: np.asarray(random_tensor(index, name, shape)).astype(wanted)
        for index, (name, shape) in enumerate(sorted(tensor_shapes(config).items()))
    }
    save_file({**tensors, **(extra or {})}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_tensor(index: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that number in a sorted list of names."""
    noise = np.random.default_rng([7, index]).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return noise * shape[-1] ** -0.5
    return 0.1 * noise + float("norm" in name.lower() and name.endswith("weight"))


def _write_tokenizer(path: Path, family: str) -> int:
    """Returns the size of the vocabulary."""
    built = TOKENIZERS[_TOKENIZERS[family]]()
    if family in ("bert", "distilbert"):
        words = [built.id_to_token(index) for index in range(built.vocabulary_size())]
        (path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        write_json(path / "tokenizer_config.json", {"do_lower_case": True})
    elif family == "bart":
        built.save_assets(str(path))
        (path / "vocabulary.json").rename(path / "vocab.json")
    else:
        built.save_assets(str(path))
        (path / "vocabulary.spm").rename(path / "tokenizer.model")
    return int(built.vocabulary_size())


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that transformers saves for a config, by name."""
    family = config["model_type"]
    if family == "gpt2":
        return _gpt2(config)
    if family in ("gemma3", "paligemma"):
        return _with_images(config)
    if family == "gemma4":
        return gemma4(config)
    if family == "qwen3_5":
        return qwen3_5(config)
    if family == "bart":
        return _bart(config)
    if family == "distilbert":
        return _distilbert(config)
    if family == "albert":
        return _albert(config)
    return _encoder(config) if "type_vocab_size" in config else _decoder(config)


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _decoder(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    family, hidden = config["model_type"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    values = config["num_key_value_heads"] * head_dim
    bias = family == "qwen2" or config.get("attention_bias") is True
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if config.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in norms}
        shapes |= _linear(f"{block}.self_attn.q_proj", queries, hidden, bias=bias)
        shapes |= _linear(f"{block}.self_attn.k_proj", values, hidden, bias=bias)
        shapes |= _linear(f"{block}.self_attn.v_proj", values, hidden, bias=bias)
        out_bias = bias and family != "qwen2"
        shapes |= _linear(f"{block}.self_attn.o_proj", hidden, queries, bias=out_bias)
        for name in ("gate", "up"):
            shapes |= _linear(
                f"{block}.mlp.{name}_proj", config["intermediate_size"], hidden, bias=False
            )
        shapes |= _linear(f"{block}.mlp.down_proj", hidden, config["intermediate_size"], bias=False)
        if family in ("qwen3", "gemma3_text"):
            shapes |= {f"{block}.self_attn.{n}_norm.weight": (head_dim,) for n in ("q", "k")}
    return shapes


def _with_images(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Gemma 3 and PaliGemma, as published."""
    text, vision = config["text_config"], config["vision_config"]
    head_dim = text.get("num_image_tokens", 256)
    decoder = _decoder({"head_dim": head_dim, **text})
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    tower = "vision_tower.vision_model"
    shapes = {f"language_model.{name}": shape for name, shape in decoder.items()}
    shapes |= {
        f"{tower}.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (hidden,),
        f"{tower}.embeddings.position_embedding.weight": (
            (vision["image_size"] // patch) ** 2,
            hidden,
        ),
        **_norm(f"{tower}.post_layernorm", hidden),
    }
    for index in range(vision["num_hidden_layers"]):
        block = f"{tower}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{block}.self_attn.{name}", hidden, hidden)
        shapes |= _linear(f"{block}.mlp.fc1", vision["intermediate_size"], hidden)
        shapes |= _linear(f"{block}.mlp.fc2", hidden, vision["intermediate_size"])
        shapes |= _norm(f"{block}.layer_norm1", hidden) | _norm(f"{block}.layer_norm2", hidden)
    projector = "multi_modal_projector"
    if config["model_type"] == "paligemma":
        return shapes | _linear(f"{projector}.linear", text["hidden_size"], hidden)
    return shapes | {
        f"{projector}.mm_input_projection_weight": (hidden, text["hidden_size"]),
        f"{projector}.mm_soft_emb_norm.weight": (hidden,),
    }


def _bart(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = config["d_model"], config["vocab_size"]
    # Positions begin at 2.
    positions = (config["max_position_embeddings"] + 2, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.shared.weight": (vocabulary, hidden)}
    for part in ("encoder", "decoder"):
        shapes |= {f"model.{part}.embed_positions.weight": positions}
        shapes |= _norm(f"model.{part}.layernorm_embedding", hidden)
        for index in range(config[f"{part}_layers"]):
            block = f"model.{part}.layers.{index}"
            attentions = ["self_attn"] if part == "encoder" else ["self_attn", "encoder_attn"]
            for attention in attentions:
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    shapes |= _linear(f"{block}.{attention}.{name}", hidden, hidden)
                shapes |= _norm(f"{block}.{attention}_layer_norm", hidden)
            shapes |= _linear(f"{block}.fc1", config[f"{part}_ffn_dim"], hidden)
            shapes |= _linear(f"{block}.fc2", hidden, config[f"{part}_ffn_dim"])
            shapes |= _norm(f"{block}.final_layer_norm", hidden)
    return shapes


def _encoder(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    prefix = "roberta." if config["model_type"] == "roberta" else ""
    tables = {
        "word_embeddings": config["vocab_size"],
        "position_embeddings": config["max_position_embeddings"],
        "token_type_embeddings": config["type_vocab_size"],
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.{name}.weight": (rows, hidden) for name, rows in tables.items()
    }
    shapes |= _norm(f"{prefix}embeddings.LayerNorm", hidden)
    for index in range(config["num_hidden_layers"]):
        block = f"{prefix}encoder.layer.{index}"
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{block}.attention.self.{name}", hidden, hidden)
        shapes |= _linear(f"{block}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{block}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{block}.intermediate.dense", inner, hidden)
        shapes |= _linear(f"{block}.output.dense", hidden, inner)
        shapes |= _norm(f"{block}.output.LayerNorm", hidden)
    if prefix:
        shapes |= _linear("lm_head.dense", hidden, hidden) | _norm("lm_head.layer_norm", hidden)
        shapes["lm_head.bias"] = (config["vocab_size"],)
    else:
        shapes |= _linear("pooler.dense", hidden, hidden)
    return shapes


def _distilbert(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = config["dim"], config["hidden_dim"], config["vocab_size"]
    positions = (config["max_position_embeddings"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "distilbert.embeddings.word_embeddings.weight": (vocabulary, hidden),
        "distilbert.embeddings.position_embeddings.weight": positions,
        "vocab_projector.bias": (vocabulary,),
        **_norm("distilbert.embeddings.LayerNorm", hidden),
        **_linear("vocab_transform", hidden, hidden),
        **_norm("vocab_layer_norm", hidden),
    }
    for index in range(config["n_layers"]):
        block = f"distilbert.transformer.layer.{index}"
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= _linear(f"{block}.attention.{name}", hidden, hidden)
        shapes |= _linear(f"{block}.ffn.lin1", inner, hidden)
        shapes |= _linear(f"{block}.ffn.lin2", hidden, inner)
        shapes |= _norm(f"{block}.sa_layer_norm", hidden)
        shapes |= _norm(f"{block}.output_layer_norm", hidden)
    return shapes


def _albert(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, width = (
        config[k] for k in ("hidden_size", "intermediate_size", "embedding_size")
    )
    tables = {
        "word_embeddings": config["vocab_size"],
        "position_embeddings": config["max_position_embeddings"],
        "token_type_embeddings": config["type_vocab_size"],
    }
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        f"albert.embeddings.{name}.weight": (rows, width) for name, rows in tables.items()
    }
    shapes |= _norm("albert.embeddings.LayerNorm", width)
    shapes |= _linear("albert.encoder.embedding_hidden_mapping_in", hidden, width)
    for name in ("query", "key", "value", "dense"):
        shapes |= _linear(f"{block}.attention.{name}", hidden, hidden)
    shapes |= _norm(f"{block}.attention.LayerNorm", hidden)
    shapes |= _linear(f"{block}.ffn", inner, hidden) | _linear(f"{block}.ffn_output", hidden, inner)
    shapes |= _norm(f"{block}.full_layer_layer_norm", hidden)
    shapes |= _linear("albert.pooler", hidden, hidden)
    shapes |= {"predictions.bias": (config["vocab_size"],)}
    shapes |= _norm("predictions.LayerNorm", width) | _linear("predictions.dense", width, hidden)
    return shapes


def _gpt2(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], hidden),
        "wpe.weight": (config["n_positions"], hidden),
        **_norm("ln_f", hidden),
    }
    for index in range(config["n_layer"]):
        block = f"h.{index}"
        # GPT-2 stores its matrices as [in, out], and a mask beside them.
        shapes |= {
            f"{block}.attn.bias": (1, 1, config["n_positions"], config["n_positions"]),
            f"{block}.attn.c_attn.weight": (hidden, 3 * hidden),
            f"{block}.attn.c_attn.bias": (3 * hidden,),
            f"{block}.attn.c_proj.weight": (hidden, hidden),
            f"{block}.attn.c_proj.bias": (hidden,),
            f"{block}.mlp.c_fc.weight": (hidden, 4 * hidden),
            f"{block}.mlp.c_fc.bias": (4 * hidden,),
            f"{block}.mlp.c_proj.weight": (4 * hidden, hidden),
            f"{block}.mlp.c_proj.bias": (hidden,),
            **_norm(f"{block}.ln_1", hidden),
            **_norm(f"{block}.ln_2", hidden),
        }
    return shapes
