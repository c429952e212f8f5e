"""What transformers answers for tiny Hugging Face folders, of every family that KerasHub converts.

transformers is the independent reference for what is read from such folders. Its answers are
stored, since neither transformers nor PyTorch is needed to test; where both are installed,
`python -m tests.models.transformers_answers` computes them again (stored: transformers 5.17.0 on
PyTorch 2.13.0), and writes anew what transformers saves of the families that tiny_huggingface does
not know.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.models.tiny_huggingface import CONFIGS, random_tensor, tiny_huggingface, write_json

_STORED = Path(__file__).with_suffix(".json")
_SAVED_FILE = Path(__file__).with_name("transformers_saved.json")

_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
_LINEAR = {"factor": 4.0, "rope_type": "linear"}


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    """The changes that make every part of a config float32."""
    parts = {k: v | _in_float32(v) for k, v in config.items() if k.endswith("_config") and v}
    return parts | {k: "float32" for k in ("dtype", "torch_dtype") if k in config}


_DECODER = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "top_k_experts": 2,
}
_QWEN3_5 = _DECODER | {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
}
_T5GEMMA = _DECODER | {
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    # No text is longer: the window of KerasHub's encoder sees all of it.
    "sliding_window": 64,
}
# Of families for which transformers itself makes the config and names the tensors.
_MADE: dict[str, dict[str, Any]] = {
    "esm": {
        "emb_layer_norm_before": False,
        "hidden_size": 32,
        "intermediate_size": 64,
        "mask_token_id": 3,
        "max_position_embeddings": 66,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": False,
        "vocab_size": 128,
    },
    "gpt_oss": _DECODER
    | {
        "head_dim": 16,
        # As KerasHub has them: published ones begin with a window.
        "layer_types": ["full_attention", "sliding_attention"],
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "rope_parameters": {"rope_theta": 150000.0, **YARN},
        # KerasHub's sees one position more.
        "sliding_window": None,
    },
    "llama": _DECODER | {"rope_parameters": {"rope_theta": 500000.0, **_LLAMA3_ROPE}},
    "mixtral": _DECODER | {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": 8},
    "qwen2_moe": _DECODER | _EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_5_moe": {
        "image_token_id": 120,
        "text_config": _QWEN3_5 | _EXPERTS | {"shared_expert_intermediate_size": 24},
        "video_token_id": 121,
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 123,
        "vision_start_token_id": 122,
    },
    "qwen3_moe": _DECODER | _EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
    "t5gemma": {
        "decoder": _T5GEMMA | {"is_decoder": True, "use_cache": False},
        "encoder": _T5GEMMA,
        "vocab_size": 128,
    },
}

_SAVED: dict[str, dict[str, Any]] = (
    json.loads(_SAVED_FILE.read_text(encoding="utf-8")) if _SAVED_FILE.exists() else {}
)
"""What transformers saves of `_MADE`: the config, and the shape of each tensor."""


def saved_config(family: str) -> dict[str, Any]:
    """The config.json of a family that transformers saves."""
    return dict(_SAVED[family]["config"])


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, _in_float32(CONFIGS[family])) for family in CONFIGS},
    # KerasHub takes heads to be as wide as there are tokens of an image.
    "paligemma": (
        "paligemma",
        {"text_config": CONFIGS["paligemma"]["text_config"] | {"head_dim": 8}},
    ),
    **{f"{family}, as saved": (f"{family}, as saved", {}) for family in _MADE},
    **{f"{family} alone": (family, {}) for family in ("albert", "distilbert", "roberta")},
    "gemma2 with a window": ("gemma2", {"sliding_window": 8}),
    "gemma3 of 6 blocks": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 8}),
    "gemma3 with scaled positions": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    ),
    "gemma4 with experts": (
        "gemma4",
        _in_float32(
            CONFIGS["gemma4"] | {"text_config": CONFIGS["gemma4"]["text_config"] | _GEMMA4_EXPERTS}
        ),
    ),
    "gpt_oss in four bits": ("gpt_oss, as saved", {}),
    "llama with a large epsilon": ("llama", {"rms_norm_eps": 1e-2}),
    "llama with scaled positions": ("llama", {"rope_scaling": _LLAMA3_ROPE}),
    "mistral with a window": ("mistral", {"head_dim": 16, "sliding_window": 8}),
    "mistral with scaled positions": ("mistral", {"rope_scaling": _LINEAR}),
    "mixtral with scaled positions": (
        "mixtral, as saved",
        {"rope_parameters": {"rope_theta": 10000.0, **_LINEAR}},
    ),
    "qwen2 with a head": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 with scaled positions": ("qwen2", {"rope_scaling": _LINEAR}),
    "qwen2_moe with scaled weights": ("qwen2_moe, as saved", {"norm_topk_prob": True}),
    "qwen3 with scaled positions": ("qwen3", {"rope_scaling": _LINEAR}),
}
"""A family and changes of its config.json, by the name of the answer.

`alone` is a model without its heads, which transformers saves under shorter names.
"""


def folder_of(name: str, path: Path) -> Path:
    """The folder that an answer is for."""
    family, changes = CASES[name]
    if family.endswith(", as saved"):
        folder = _as_saved(family.removesuffix(", as saved"), path, changes)
        return in_four_bits(folder) if name.endswith(" in four bits") else folder
    extra = {}
    if family == "roberta":  # zeros, as in every published one
        extra["roberta.embeddings.token_type_embeddings.weight"] = np.zeros((1, 32), np.float32)
    folder = tiny_huggingface(path, family, extra=extra, **{"torch_dtype": "float32", **changes})
    if name.endswith(" alone"):
        tensors = load_file(folder / "model.safetensors")
        inner = {
            k.removeprefix(f"{family}."): v for k, v in tensors.items() if k.startswith(family)
        }
        save_file(inner, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [config["architectures"][0].partition("For")[0] + "Model"]
        write_json(folder / "config.json", config)
    return folder


def _as_saved(family: str, path: Path, changes: dict[str, Any]) -> Path:
    saved = _SAVED[family]
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", saved["config"] | changes)
    tensors = {
        name: random_tensor(index, name, tuple(shape))
        for index, (name, shape) in enumerate(sorted(saved["tensors"].items()))
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def in_four_bits(folder: Path) -> Path:
    """Store a GPT-OSS's experts in MXFP4, as published ones are: of random codes and scales."""
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (*blocks, 16), dtype=np.uint8)
        tensors[f"{name}_scales"] = rng.integers(121, 125, blocks, dtype=np.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    write_json(folder / "config.json", config)
    return folder


def tokens() -> NDArray[np.int32]:
    """What the models are asked, [batch, sequence]."""
    return np.random.default_rng(3).integers(5, 119, (1, 24), dtype="int32")


def sampled(output: NDArray[Any]) -> NDArray[Any]:
    """The part of logits or hidden states, [batch, sequence, features], that is stored."""
    return output[0, ::8, ::16]


def stored_answer(name: str) -> NDArray[np.float64]:
    """The sampled answer of transformers."""
    return np.array(json.loads(_STORED.read_text(encoding="utf-8"))[name])


_HALVES = ("bart", "t5gemma")
"""Families of an encoder and a decoder, which are asked with the same tokens."""


def _main() -> None:
    import torch
    import transformers  # type: ignore[import-not-found]

    for family in _MADE:
        _SAVED[family] = _saved(transformers, family)
    _write(_SAVED_FILE, _SAVED)
    _write(_STORED, {name: _answer(torch, transformers, name) for name in CASES})


def _answer(torch: Any, transformers: Any, name: str) -> Any:
    given = torch.tensor(tokens(), dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = folder_of(name, Path(folder))
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
        generates = architecture.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
        # Encoders are compared without their heads.
        kind = getattr(transformers, architecture) if generates else transformers.AutoModel
        options = {"attn_implementation": "eager", "dtype": "float32"}
        if "quantization_config" in config:
            options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        model, found = kind.from_pretrained(path, output_loading_info=True, **options)
        # Encoders are compared before their pooler; frequencies are computed.
        beside = ("pooler", "inv_freq")
        missing = [k for k in found["missing_keys"] if not any(b in k for b in beside)]
        assert not missing, f"{name}: {missing}"
        asked: dict[str, Any] = {"input_ids": given}
        if config["model_type"] in _HALVES:
            asked["decoder_input_ids"] = given
        if config["model_type"] == "paligemma":
            asked |= _with_image(torch, config, given)
        output = model.float().eval()(**asked)
        answer = output.logits if generates else output.last_hidden_state
        answer = answer[:, -given.shape[1] :]
        return sampled(answer.detach().numpy()).round(6).tolist()


def _with_image(torch: Any, config: dict[str, Any], given: Any) -> dict[str, Any]:
    """A black image before the text, of which each token sees those before it."""
    vision = config["vision_config"]
    size, number = vision["image_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    ids = torch.full((1, number), config["image_token_index"])
    kinds = [torch.zeros_like(ids), torch.ones_like(given)]
    return {
        "input_ids": torch.cat([ids, given], 1),
        "pixel_values": torch.zeros((1, 3, size, size)),
        "token_type_ids": torch.cat(kinds, 1),
    }


def _saved(transformers: Any, family: str) -> dict[str, Any]:
    config = transformers.AutoConfig.for_model(family, **_MADE[family])
    kinds = ("ImageTextToText", "CausalLM", "Seq2SeqLM", "MaskedLM")
    mappings = [getattr(transformers, f"AutoModelFor{kind}") for kind in kinds]
    kind = next(kind for kind in mappings if type(config) in kind._model_mapping)
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(config).save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        content = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if family == "esm":
        shapes = _published_esm(shapes)
    return {"config": content, "tensors": shapes}


def _published_esm(shapes: dict[str, Any]) -> dict[str, Any]:
    """As in published ones; transformers 5.17 saves names that no other release reads."""
    named = {
        name.replace(".gamma", ".weight").replace(".beta", ".bias"): shapes[name] for name in shapes
    }
    return {name: shape for name, shape in named.items() if "inv_freq" not in name}


def _write(file: Path, content: dict[str, Any]) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(content[name])}" for name in sorted(content))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
