"""What KerasHub's converters make of published configs, and what they would drop in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SourceError
from pipeline.model.huggingface import check_converted
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import Skeleton, build_skeleton
from tests.models.tiny_huggingface import CONFIGS, write_json
from tests.models.transformers_answers import YARN, saved_config
from tests.selection import by_default

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "models/published_configs.json").read_text(encoding="utf-8")
)
"""Of real models, with fewer blocks."""

SAVED = {
    "gpt_oss": saved_config("gpt_oss") | {"sliding_window": None},
    "qwen3_moe": saved_config("qwen3_moe"),
}


GPT_OSS = (
    ({"swiglu_limit": 6.0}, "swiglu_limit is 6.0, but .* has 7.0"),
    ({"experts_per_token": 3}, "experts_per_token is 3, but .* chooses 2"),
    (
        {"rope_parameters": {"rope_theta": 150000.0, **YARN, "beta_fast": 16.0}},
        "beta_fast is 16.0, but .* has 32.0",
    ),
    (
        {"rope_parameters": {"rope_theta": 150000.0, **YARN, "mscale": 0.7}},
        "mscale is 0.7, which .* ignores",
    ),
)


@pytest.fixture
def checked(tmp_path: Path) -> Callable[[dict[str, Any]], Skeleton]:
    def build(config: dict[str, Any]) -> Skeleton:
        write_json(tmp_path / "config.json", config)
        preset = read_preset(str(tmp_path))
        skeleton = build_skeleton(preset)
        check_converted(preset, skeleton.backbone, skeleton.predicts_tokens)
        return skeleton

    return build


OTHERWISE = {
    # KerasHub scales their queries as those of the smaller models.
    "gemma-2-27b": "query_pre_attn_scalar is 144.* presets of its own",
    "gemma-3-27b": "scalar is 168.* presets of its own",
    # Its windows begin with the other block.
    "gpt-oss-20b": r"sees? a window only \(set sliding_window to null",
}


@pytest.mark.parametrize(
    "name",
    by_default(
        sorted(PUBLISHED.keys() - OTHERWISE), ["llama-3.2", "gemma-3-270m", "gemma-3-4b", "smollm2"]
    ),
)
def test_published_models_are_taken(
    name: str, checked: Callable[[dict[str, Any]], Skeleton]
) -> None:
    checked(PUBLISHED[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERWISE)
def test_published_models_that_kerashub_computes_otherwise_are_refused(
    name: str, checked: Callable[[dict[str, Any]], Skeleton]
) -> None:
    with pytest.raises(SourceError, match=OTHERWISE[name]):
        checked(PUBLISHED[name])


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, but .* has no biases"),
        ("llama", {"head_dim": 16}, "head_dim is 16, but .* gives every head 8 values"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', but .* another activation"),
        ("llama", {"logits_scale": 4.0}, "logits_scale is 4.0, which .* remove it from"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "has no such scaling"),
        # KerasHub's Llama has an argument for it, and computes without.
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "has no such scaling"),
        ("qwen3", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, .* norms with 1e-05"),
        ("mistral", {"tie_word_embeddings": True}, "always has a head of its own"),
        ("qwen2", {"is_causal": False}, "is_causal is False"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "has no such scaling"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "lets all layers slide or none",
        ),
        ("gemma", {"rope_theta": 1e6}, "rope_theta is 1000000.0, but .* rotates positions by 1000"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
        # KerasHub's Gemma does not hand on to its attention what the backbone was told.
        ("gemma2", {"head_dim": 16}, "query_pre_attn_scalar is 8, .* scales queries by 16"),
        ("bert", {"is_decoder": True}, "is_decoder is True, but .* lets all positions see"),
        ("gemma3_text", {"sliding_window_pattern": 2}, "lets other layers see a window only"),
        ("gpt2", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001, .* norms with 1e-05"),
        # KerasHub's Gemma gives it to one of its norms.
        ("gemma", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, .* norms with 1e-06"),
        ("gpt2", {"n_inner": 100}, "n_inner is 100, but .* has 128"),
        ("gpt2", {"scale_attn_weights": False}, "is made for True"),
        ("bert", {"hidden_act": "relu"}, "another activation"),
        ("bert", {"position_embedding_type": "relative_key"}, "is made for 'absolute'"),
        ("roberta", {"layer_norm_eps": 1e-12}, "norms with 1e-05"),
        (
            "bart",
            {"decoder_attention_heads": 8},
            "decoder_attention_heads is 8, but .* has 4 heads",
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1]},
            r"mlp_only_layers is \[1\], which .* ignores",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, but .* made for 1"),
        # Of the same order, but one position more.
        ("gpt_oss", {"sliding_window": 8}, "sliding_window is 8, but .* sees 9 .* to null if"),
        *(pytest.param("gpt_oss", *case, marks=pytest.mark.exhaustive) for case in GPT_OSS),
        ("bart", {"scale_embedding": True}, "scale_embedding is True, which .* ignores"),
        (
            "gemma3",
            {"vision_config": CONFIGS["gemma3"]["vision_config"] | {"hidden_act": "relu"}},
            "vision_config.hidden_act is 'relu', but .* computes gelu",
        ),
        (
            "gemma3",
            {"text_config": CONFIGS["gemma3"]["text_config"] | {"query_pre_attn_scalar": 99}},
            "text_config.query_pre_attn_scalar is 99",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"already quantized \(gptq\); start from the float model",
        ),
    ],
)
def test_a_setting_that_kerashub_drops_is_refused_by_name(
    family: str,
    changes: dict[str, Any],
    expected: str,
    checked: Callable[[dict[str, Any]], Skeleton],
) -> None:
    config = CONFIGS[family] | {"vocab_size": 320} if family in CONFIGS else SAVED[family]
    checked(config)
    with pytest.raises(SourceError, match=expected) as refused:
        checked(config | changes)
    assert "config.json: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_epsilon_that_the_converter_forgets_is_taken_over(
    checked: Callable[[dict[str, Any]], Skeleton],
) -> None:
    skeleton = checked(CONFIGS["llama"] | {"vocab_size": 320, "rms_norm_eps": 3e-4})
    assert skeleton.backbone_json["config"]["layer_norm_epsilon"] == 3e-4
    assert skeleton.backbone.layer_norm_epsilon == 3e-4


def test_a_scaling_of_positions_is_found_where_transformers_5_puts_it(
    checked: Callable[[dict[str, Any]], Skeleton],
) -> None:
    """A converter reads rope_theta from there, and would drop the rest."""
    before, after = (PUBLISHED[name] for name in ("llama-3.2", "llama-3.2-v5"))
    assert "rope_scaling" not in after
    found = checked(after).backbone_json["config"]
    assert found["rope_frequency_adjustment_factor"] == 32.0
    assert found == checked(before).backbone_json["config"]


def test_a_llama_2_says_nothing_of_rotation(
    checked: Callable[[dict[str, Any]], Skeleton],
) -> None:
    assert "rope_theta" not in PUBLISHED["llama-2"]
    config = checked(PUBLISHED["llama-2"]).backbone_json["config"]
    assert config["rope_max_wavelength"] == 10000.0


SENTENCE_TRANSFORMERS = [
    {"type": f"sentence_transformers.models.{name}"}
    for name in ("Transformer", "Pooling", "Normalize")
]


def embedder(folder: Path, family: str, pooling: dict[str, Any], *more: str) -> Any:
    write_json(folder / "config.json", CONFIGS[family] | {"vocab_size": 320})
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in more]
    write_json(folder / "modules.json", [*SENTENCE_TRANSFORMERS, *modules])
    write_json(folder / "1_Pooling/config.json", pooling)
    return build_skeleton(read_preset(str(folder))).task


@pytest.mark.parametrize(
    ("family", "pooling", "mode"),
    [
        ("bert", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ("bert", {"pooling_mode": "max"}, "max"),
        ("qwen3", {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "last"),
        ("qwen3", {"pooling_mode": "mean"}, "mean"),
    ],
)
def test_an_embedder_pools_as_its_source(
    family: str, pooling: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    """KerasHub's converters take what they do not know for a mean, or for the last token."""
    task = embedder(tmp_path, family, pooling)
    assert (task.pooling_mode, task.normalize) == (mode, True)


@pytest.mark.parametrize(
    ("pooling", "more", "expected"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, [], "pools by weightedmean_tokens"),
        ({"pooling_mode_cls_token": 1, "pooling_mode_max_tokens": 1}, [], "cls_token and max_tok"),
        ({"pooling_mode_cls_token": True}, ["Dense"], "a step Dense, which KerasHub's embedders"),
    ],
)
def test_a_step_that_no_embedder_of_kerashub_has_is_refused(
    pooling: dict[str, Any], more: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=expected):
        embedder(tmp_path, "bert", pooling, *more)


def test_a_sentence_transformer_needs_no_head_whatever_its_architecture(tmp_path: Path) -> None:
    assert CONFIGS["qwen3"]["architectures"] == ["Qwen3ForCausalLM"]
    task = embedder(tmp_path, "qwen3", {"pooling_mode_lasttoken": True})
    assert type(task).__name__ == "Qwen3TextEmbedder"
    assert task.backbone.tie_word_embeddings


def test_a_window_that_is_not_in_use_is_none(checked: Callable[[dict[str, Any]], Skeleton]) -> None:
    """Blocks of KerasHub's Qwen3Moe slide wherever there is a size."""
    config = SAVED["qwen3_moe"] | {"sliding_window": 8, "use_sliding_window": False}
    assert checked(config).backbone.sliding_window_size is None


@pytest.mark.exhaustive
def test_a_gpt_oss_without_windows_is_taken(checked: Callable[[dict[str, Any]], Skeleton]) -> None:
    config = PUBLISHED["gpt-oss-20b"] | {"sliding_window": None}
    assert checked(config).backbone.sliding_window is None
