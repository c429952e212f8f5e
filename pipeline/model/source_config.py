"""What a Hugging Face config.json says, against what KerasHub's converter makes of it.

A converter takes the keys that it knows and ignores the others in silence, and some of those decide
what a model computes: the norms' epsilon, a scaling of the rotary embedding, a sliding window. So
the config notes which keys are read, and every other key must be known to be harmless, or agree
with the backbone that was built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.model.preset import CONFIG_FILE, PresetFiles

# What transformers takes where a config of a decoder says nothing, and converters insist. A wrong
# number or width of heads, or a missing head, would not fit the tensors.
_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,  # Gemma's: published configs of Gemma 3 with images lack it
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
# Other names of keys that converters insist on, as newer or other configs have them.
_OTHER_NAMES = {
    "num_experts": "num_local_experts",
    "num_hidden_layers": "encoder_layers",
    "num_key_value_heads": "num_attention_heads",
}


class NotedConfig(dict[str, Any]):
    """The content of a config.json that notes which of its keys are read."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(
            (key, NotedConfig(value) if isinstance(value, dict) else value)
            for key, value in content.items()
        )
        self.keys_read: set[str] = set()
        self.hidden: set[str] = set()
        """Keys that the converter is not to see, and that are checked all the same."""

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        other = _OTHER_NAMES.get(key)
        return _DEFAULTS[key] if other is None or other not in self else self[other]

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.hidden:
            return default
        self.keys_read.add(key)
        return super().get(key, default)

    def entries(self, inside: str = "") -> Iterator[tuple[str, str, Any, bool]]:
        """Every key: the path of the mapping that it is in, its name and value, whether read."""
        for key in sorted(self):
            value, read = super().__getitem__(key), key in self.keys_read
            if isinstance(value, NotedConfig) and (read or key == "rope_parameters"):
                yield from value.entries(f"{inside}.{key}" if inside else key)
            else:
                yield inside, key, value, read


def normalized_config(content: Mapping[str, Any]) -> NotedConfig:
    """A config with its settings where KerasHub's converters look for them."""
    config = dict(content)
    rope = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "type" in scaling:
        # Its name before rope_type.
        config["rope_scaling"] = {"rope_type": scaling["type"], **scaling}
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        # Transformers 5 moved what was rope_scaling into rope_parameters. Converters take only
        # rope_theta from there.
        config["rope_parameters"] = {k: v for k, v in rope.items() if k == "rope_theta"}
        if config.get("rope_scaling") is None:
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = normalized_config(config["text_config"])
    return NotedConfig(config)


def scaled_positions(config: NotedConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone for a linear scaling of positions, which its converter does not read.

    Also hides scalings from a converter that knows Llama 3's alone: its complaint names no key.
    KerasHub's Llama has an argument for a linear one, too, but computes without it.

    Args:
        parameters: of the backbone's class, by name.
    """
    scaling = config.get("rope_scaling")
    config.keys_read.discard("rope_scaling")
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind == "linear" and "factor" in scaling and "rope_scaling_factor" in parameters:
        config.hidden.add("rope_scaling")
        return {"rope_scaling_factor": scaling["factor"]}
    if kind not in (None, "llama3") and "rope_frequency_adjustment_factor" in parameters:
        config.hidden.add("rope_scaling")
    return {}


_EPSILON_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def taken_over(config: NotedConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone that its converter forgets.

    Args:
        parameters: of the backbone's class, by name.
    """
    found = [key for key in _EPSILON_KEYS if key in config and key not in config.keys_read]
    if len(found) != 1 or "layer_norm_epsilon" not in parameters:
        return {}
    return {"layer_norm_epsilon": config[found[0]]}


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
    text = _Model(config=config, backbone=backbone, layers=others, generates=generates)
    beside = replace(text, layers=seeing)
    where, name = f"{preset.url}/{CONFIG_FILE}", type(backbone).__name__
    for inside, key, value, read in config.entries():
        part = inside.partition(".")[0]
        model, rules = (
            (beside, _ENCODERS_RULES[part]) if part in _ENCODERS_RULES else (text, _RULES)
        )
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


@dataclass(frozen=True, kw_only=True)
class _Model:
    config: NotedConfig
    backbone: Any
    layers: Sequence[Any]
    """Of the text model, or of the encoders beside it."""
    generates: bool

    def value(self, *names: str) -> Any:
        """A value of the text model under the first of these names."""
        config = dict(self.config)
        config |= config.get("text_config") or {}
        return next((config[name] for name in names if config.get(name) is not None), None)

    def attributes(self, *names: str) -> list[Any]:
        """The values of all layers that have an attribute of one of these names."""
        found = [getattr(layer, name, None) for layer in self.layers for name in names]
        return [value for value in found if value is not None]

    @property
    def head_dim(self) -> int | None:
        hidden, heads = self.value("hidden_size", "n_embd"), self.value("num_attention_heads")
        own = getattr(self.backbone, "head_dim", None)
        return own or (hidden // heads if hidden and heads else None)


def _epsilon(value: Any, model: _Model) -> str | None:
    norms = [layer for layer in model.layers if "Norm" in type(layer).__name__]
    # KerasHub's Qwen3 gives the norms of each head's queries and keys a constant of their own.
    # Those are large, and with 1e-05 for 1e-06 the logits differ from transformers' by 0.00001.
    if value <= 1e-5:
        heads = model.head_dim
        norms = [norm for norm in norms if heads not in [w.shape[-1] for w in norm.weights]]
    found = [getattr(norm, "epsilon", getattr(norm, "_epsilon", None)) for norm in norms]
    other = [e for e in found if e is not None and not math.isclose(e, value, rel_tol=1e-6)]
    return f"has norms with {min(other):g}" if other else None


_POINTS = np.array([-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0], np.float32)
# The two forms of gelu differ by less than 0.0005, and KerasHub takes one for the other.
_ACTIVATIONS = {
    r"gelu(_new|_fast|_python|_pytorch_tanh|_accurate|_approximate|_10)?": keras.activations.gelu,
    r"silu|swish": keras.activations.silu,
    r"relu": keras.activations.relu,
    r"tanh": keras.activations.tanh,
    r"sigmoid": keras.activations.sigmoid,
    r"relu2": lambda x: keras.ops.square(keras.ops.relu(x)),
    r"quick_gelu": lambda x: x * keras.ops.sigmoid(1.702 * x),
}


def _shapes(model: _Model) -> list[NDArray[np.float32]]:
    """What the activations that the layers name make of some points; linear ones left out."""
    functions = [f for f in model.attributes("activation") if callable(f)]
    shapes = [np.asarray(function(_POINTS)) for function in functions]
    return [shape for shape in shapes if not np.allclose(shape, _POINTS)]


def _activation(value: Any, model: _Model) -> str | None:
    shapes = _shapes(model)
    named = next((f for names, f in _ACTIVATIONS.items() if re.fullmatch(names, str(value))), None)
    if named is not None:
        expected = np.asarray(named(_POINTS))
        # Some blocks compute theirs without naming it; those are of families with one activation.
        if not shapes or any(np.allclose(shape, expected, atol=2e-3) for shape in shapes):
            return None
    return "has another activation"


def _vision_activation(value: Any, model: _Model) -> str | None:
    if _shapes(model) or "gelu" in str(value):
        return _activation(value, model)
    # Those of KerasHub that name none compute it.
    return "computes gelu"


def _head_dim(value: Any, model: _Model) -> str | None:
    if value is None or model.head_dim is None or value == model.head_dim:
        return None
    return f"gives every head {model.head_dim} values"


def _rope_theta(value: Any, model: _Model) -> str | None:
    found = sorted(set(model.attributes("max_wavelength")))
    if value is None or not found or any(math.isclose(value, theta) for theta in found):
        return None
    if model.value("rope_local_base_freq") in found and all(_slides(model)):
        # Of two values, the other one: no block sees all positions.
        return None
    return f"rotates positions by {' and '.join(f'{theta:g}' for theta in found)}"


def _rope_scaling(value: Any, model: _Model) -> str | None:
    # One that the converter reads arrives here key by key.
    named = value.get("rope_type", value.get("type")) if isinstance(value, dict) else value
    if named in (None, "default"):
        return None
    if named == "linear" and _stretches(model) == {("linear", float(value.get("factor", 1)))}:
        return None
    return (
        "has no such scaling of positions (remove rope_scaling if the model was trained without, "
        "and texts stay as short as then)"
    )


def _stretches(model: _Model) -> set[tuple[str, float]]:
    """How positions are scaled, and by which factor, in all layers that rotate by them."""
    layers = [layer for layer in model.layers if type(layer).__name__ == "RotaryEmbedding"]
    return {(layer.rope_type, float(layer.scaling_factor)) for layer in layers}


def _rope_type(value: Any, model: _Model) -> str | None:
    known = ["default", "linear", "llama3"]
    if hasattr(model.backbone, "global_rope_partial_rotary_factor"):
        known.append("proportional")
    return None if value in known else "has no such scaling of positions"


def _tied(value: Any, model: _Model) -> str | None:
    tied = model.attributes("tie_weights")
    if not model.generates or not tied or bool(value) in tied:
        return None
    return "always has a head of its own" if value else "always uses the embeddings as its head"


def _slides(model: _Model) -> list[bool]:
    """Of each block of a backbone in which some slide, whether it does."""
    found = [getattr(o, "use_sliding_window_attention", None) for o in model.backbone.layers]
    return [slides for slides in found if slides is not None]


def _layer_types(value: Any, model: _Model) -> str | None:
    wanted = [str(kind) == "sliding_attention" for kind in value or ()]
    window = model.value("sliding_window")
    if len(set(value or ())) <= 1 and (not any(wanted) or window):
        return None
    if any(wanted) and (slides := _slides(model)):
        return None if wanted == slides else "lets other layers see a window only"
    # Of other kinds, or where blocks do not tell: the converter must have read them.
    parts = [model.config, *(p for p in dict(model.config).values() if isinstance(p, NotedConfig))]
    if all("layer_types" in part.keys_read for part in parts if "layer_types" in part):
        return None
    return "lets other layers see a window only" if any(wanted) else "has one kind of attention"


def _sliding_window_pattern(value: Any, model: _Model) -> str | None:
    slides = _slides(model)
    wanted = [bool((index + 1) % value) for index in range(len(slides))] if value else slides
    return None if wanted == slides else "lets other layers see a window only"


def _use_sliding_window(value: Any, model: _Model) -> str | None:
    if not value or (model.value("max_window_layers") or 0) >= model.value("num_hidden_layers"):
        return None
    return (
        "lets all layers slide or none (set it to false if texts stay shorter than sliding_window)"
    )


def _n_inner(value: Any, model: _Model) -> str | None:
    expected = 4 * model.value("n_embd", "hidden_size")
    return None if value in (None, expected) else f"has {expected}"


def _query_scale(value: Any, model: _Model) -> str | None:
    found = set(model.attributes("query_pre_attn_scalar"))
    for layer in model.layers:
        # What the backbone says of itself is not always what its attention does: KerasHub's Gemma
        # does not hand it on.
        if "Attention" in type(layer).__name__ and hasattr(layer, "query_head_dim_normalize"):
            own = layer.hidden_dim // layer.num_query_heads
            found.add(layer.head_dim if layer.query_head_dim_normalize else own)
    if value is None or not found or found == {value}:
        return None
    scales = " and ".join(str(scale) for scale in sorted(found))
    return (
        f"scales queries by {scales} (in presets of its own too: name one to quantize it as it is)"
    )


def _attention_bias(value: Any, model: _Model) -> str | None:
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    parts = [layer for layer in model.layers if isinstance(layer, kinds)]
    found = any(layer.bias is not None for layer in parts if "attention" in layer.path)
    return None if bool(value) == found else f"has {'' if found else 'no '}biases in its attention"


def _cross_attention(value: Any, model: _Model) -> str | None:
    encoder = dict(model.config).get("encoder") or {}
    expected = encoder.get("hidden_size")
    return None if value in (None, expected) else f"has {expected} there"


def _is_decoder(value: Any, model: _Model) -> str | None:
    # Said of one half of a model that has both.
    halves = isinstance(dict(model.config).get("decoder"), NotedConfig)
    return None if not value or halves or model.generates else "lets all positions see each other"


def _position_embedding(value: Any, model: _Model) -> str | None:
    expected = getattr(model.backbone, "position_embedding_type", "absolute")
    return None if value in (None, expected) else f"is made for {expected!r}"


def _rotary_factor(value: Any, model: _Model) -> str | None:
    names = ("partial_rotary_factor", "global_rope_partial_rotary_factor")
    found = [getattr(model.backbone, name, None) for name in names]
    expected = [factor for factor in found if factor is not None] or [1.0]
    return None if value in (None, *expected) else f"rotates {expected[0]:g} of each head"


def _full_attention_interval(value: Any, model: _Model) -> str | None:
    # What layer_types repeats; the converter's own without it.
    return None if value in (None, 4) or model.value("layer_types") else "has an interval of 4"


def _decoder_heads(value: Any, model: _Model) -> str | None:
    expected = model.value("encoder_attention_heads", "num_attention_heads")
    return None if value in (None, expected) else f"has {expected} heads in every block"


def _must_be(expected: Any) -> Callable[[Any, _Model], str | None]:
    def rule(value: Any, _model: _Model) -> str | None:
        return None if value in (None, expected) else f"is made for {expected!r}"

    return rule


_RULES: dict[str, Callable[[Any, _Model], str | None]] = {
    **dict.fromkeys(_EPSILON_KEYS, _epsilon),
    "hidden_act": _activation,
    "activation_function": _activation,
    "activation": _activation,
    "hidden_activation": lambda value, model: value and _activation(value, model),
    "head_dim": _head_dim,
    "rope_theta": _rope_theta,
    "rope_local_base_freq": _rope_theta,
    "rope_scaling": _rope_scaling,
    "rope_type": _rope_type,
    "tie_word_embeddings": _tied,
    "layer_types": _layer_types,
    "sliding_window_pattern": _sliding_window_pattern,
    "_sliding_window_pattern": _sliding_window_pattern,
    "use_sliding_window": _use_sliding_window,
    "n_inner": _n_inner,
    "query_pre_attn_scalar": _query_scale,
    "partial_rotary_factor": _rotary_factor,
    "full_attention_interval": _full_attention_interval,
    "position_embedding_type": _position_embedding,
    "attention_bias": _attention_bias,
    "qkv_bias": _attention_bias,
    "cross_attention_hidden_size": _cross_attention,
    "scale_attn_weights": _must_be(True),
    "decoder_sparse_step": _must_be(1),
    "is_causal": _must_be(True),
    "is_decoder": _is_decoder,
    "decoder_attention_heads": _decoder_heads,
    "normalize_embedding": _must_be(True),
    "extra_pos_embeddings": _must_be(2),
}
"""For keys that must agree with the backbone: what it has instead; None if they agree."""

_VISION_RULES: dict[str, Callable[[Any, _Model], str | None]] = {
    **dict.fromkeys(_EPSILON_KEYS, _epsilon),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _vision_activation),
    "rope_type": _rope_type,
    "rope_theta": _must_be(10000.0),
}
_ENCODERS_RULES = {
    "vision_config": _VISION_RULES,
    "audio_config": {**_VISION_RULES, "hidden_act": _must_be("silu")},
}
"""The same for the encoders of images and sounds."""
