"""What a Hugging Face config.json says, against what KerasHub's converter makes of it.

A converter takes the keys that it knows and ignores the others in silence, and some of those decide
what a model computes: the norms' epsilon, a scaling of the rotary embedding, a sliding window. So
the config notes which keys are read, and every other key must be known to be harmless, or agree
with the backbone that was built.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pipeline.errors import SourceError
from pipeline.model.config_rules import ENCODERS_CONSTANTS, ENCODERS_RULES, RULES, ModelSettings
from pipeline.model.noted_config import NotedConfig
from pipeline.model.preset import CONFIG_FILE, PresetFiles


def check_config(preset: PresetFiles, config: NotedConfig, backbone: Any, generates: bool) -> None:
    """Check that a backbone computes what its config.json says.

    Args:
        config: after the converter has read it.
        generates: whether the model's output is the next token's logits.

    Raises:
        SourceError: a setting that KerasHub ignores and that changes the model's answers, or of
            which this is not known.
    """
    encoders = [getattr(backbone, name, None) for name in _ENCODERS]
    seeing = [layer for encoder in encoders if encoder for layer in encoder._flatten_layers()]
    others = [layer for layer in backbone._flatten_layers() if layer not in seeing]
    text = ModelSettings(config=config, backbone=backbone, layers=others, generates=generates)
    beside = replace(text, layers=seeing)
    where, name = f"{preset.url}/{CONFIG_FILE}", type(backbone).__name__
    for inside, key, value, read in config.entries():
        part = inside.partition(".")[0]
        model, rules = (beside, ENCODERS_RULES[part]) if part in ENCODERS_RULES else (text, RULES)
        path = f"{inside}.{key}" if inside else key
        shared = _shared_value(config, inside, key, read)
        if shared is not None:
            if shared == value:
                continue
            raise SourceError(
                f"{where}: {path} is {_shown(value)}, but KerasHub's {name} takes decoder.{key} "
                f"for both, {_shown(shared)}, and so would answer differently; such a model cannot "
                "be quantized"
            )
        if key in rules:
            expected = rules[key](value, model)
            if expected is not None:
                raise SourceError(
                    f"{where}: {path} is {_shown(value)}, but KerasHub's {name} {expected}, and so "
                    "would answer differently; such a model cannot be quantized"
                )
        elif part in ENCODERS_RULES and ENCODERS_CONSTANTS.get(key) == value:
            continue
        elif not read and value not in _OFF and not _HARMLESS.fullmatch(key):
            raise SourceError(
                f"{where}: {path} is {_shown(value)}, which KerasHub's converter for {name} "
                "ignores; if it has no part in what the model computes, remove it from "
                f"{CONFIG_FILE}, otherwise such a model cannot be quantized"
            )


def _shared_value(config: NotedConfig, inside: str, key: str, read: bool) -> Any:
    """The decoder's value of a setting, where a converter takes it for the encoder too."""
    decoder = dict(config).get("decoder")
    if inside != "encoder" or read or not isinstance(decoder, NotedConfig):
        return None
    return dict(decoder).get(key) if key in decoder.keys_read else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_ENCODERS = ("vision_encoder", "vit_encoder", "audio_encoder")
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})

_HARMLESS = re.compile(
    "|".join(
        (
            # Names and versions; keys with an underscore are bookkeeping.
            "_.*|architectures|model_type|auto_map|.*version|tokenizer_class|processor_class|name",
            "is_llama_config|finetuning_task|task_specific_params|custom_pipelines|adapters|model_name|language",
            r"transformers\.js_config|sentence_transformers|matryoshka_dimensions|prefix",
            # The dtype is read apart from the converter.
            "torch_dtype|dtype|use_bfloat16",
            # How weights were initialized and trained.
            ".*initializer.*|init_std|.*dropout.*|.*pdrop|.*layer_?drop|.*_prob|gradient_.*",
            "aux_loss_coef|router_aux_loss_coef|label_smoothing|rope_init|use_flash_attn",
            # Ids of tokens, and sizes of tables that the shapes of tensors confirm.
            ".*token_ids?|.*token_index|vocab_size|type_vocab_size|original_vocab_size",
            # The most positions that a model is used with; a table of them has this shape.
            ".*max_position_embeddings|max_seq_len.*|max_sequence_length|n_ctx|n_positions",
            # What transformers returns, and heads on top of the backbone.
            "output_.*|return_.*|use_cache|cache_implementation|torchscript|tf_legacy_loss",
            "id2label|label2id|num_labels|problem_type|summary_.*|tie_encoder_decoder",
            "pooler_.*|directionality|classifier_.*|classifiers_size|position_biased_input",
            # Generation.
            "max_length|min_length|do_sample|early_stopping|num_beam.*|temperature|top_[kp]",
            "typical_p|.*_penalty|.*no_repeat_ngram_size|bad_words_ids|num_return_sequences",
            "remove_invalid_values|.*suppress_tokens|max_new_tokens|generation_.*|chat_template.*",
            # How a computation is cut, not what is computed.
            "pretraining_tp|chunk_size_feed_forward|pruned_heads|reorder_and_upcast_attn",
            # Part of use_sliding_window and of layer_types, which are checked.
            "max_window_layers|sliding_window|sliding_window_size",
            # Part of no_rope_layers.
            "no_rope_layer_interval",
            # Repeats rope_type, which is checked; the converter takes the numbers that it needs.
            "type|original_max_position_embeddings",
            # What the shapes of tensors confirm.
            "hidden_size|intermediate_size|num_hidden_layers|num_attention_heads|n_head|n_layer",
            "num_key_value_heads|n_embd|num_hidden_groups|(en|de)coder_(layers|ffn_dim)",
            "attn_output_gate|attention_k_eq_v|use_clipped_linears",
            # Of tokens beyond the next, predicted for speculative decoding.
            "mtp_.*",
            # The precision of what a cache keeps.
            "mamba_ssm_dtype",
            # Of other versions of these models, and read by none.
            "tie_weights_|net_structure_type|num_memory_blocks|down_scale_factor|gap_size",
            # Of text with images; text alone computes without.
            "mm_tokens_per_image|ignore_index|vision_use_head|mrope_interleaved",
            # Of encoders of images: what the shapes of tensors confirm, and what none computes.
            "image_size|num_channels|projection_dim|projector_hidden_act|num_image_tokens",
            "out_hidden_size|global_head_dim|vision_soft_tokens_per_image|default_output_length",
            # That there are two chains, which the class of the backbone says, too.
            "is_encoder_decoder|force_bos_token_to_be_generated",
        )
    )
)
"""Keys that decide nothing of what a text model computes, or nothing that is not checked apart."""
