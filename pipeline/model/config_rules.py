"""What a backbone must have for each key of a config.json that decides what a model computes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.model.noted_config import EPSILON_KEYS, NotedConfig


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A backbone beside the config.json that it was built from."""

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


def _epsilon(value: Any, model: ModelSettings) -> str | None:
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


def _shapes(model: ModelSettings) -> list[NDArray[np.float32]]:
    """What the activations that the layers name make of some points; linear ones left out."""
    functions = [f for f in model.attributes("activation") if callable(f)]
    shapes = [np.asarray(function(_POINTS)) for function in functions]
    return [shape for shape in shapes if not np.allclose(shape, _POINTS)]


def _activation(value: Any, model: ModelSettings) -> str | None:
    shapes = _shapes(model)
    named = next((f for names, f in _ACTIVATIONS.items() if re.fullmatch(names, str(value))), None)
    if named is not None:
        expected = np.asarray(named(_POINTS))
        # Some blocks compute theirs without naming it; those are of families with one activation.
        if not shapes or any(np.allclose(shape, expected, atol=2e-3) for shape in shapes):
            return None
    return "has another activation"


def _vision_activation(value: Any, model: ModelSettings) -> str | None:
    if _shapes(model) or "gelu" in str(value):
        return _activation(value, model)
    # Those of KerasHub that name none compute it.
    return "computes gelu"


def _head_dim(value: Any, model: ModelSettings) -> str | None:
    if value is None or model.head_dim is None or value == model.head_dim:
        return None
    return f"gives every head {model.head_dim} values"


def _rope_theta(value: Any, model: ModelSettings) -> str | None:
    found = sorted(set(model.attributes("max_wavelength")))
    if value is None or not found or any(math.isclose(value, theta) for theta in found):
        return None
    if model.value("rope_local_base_freq") in found and all(_slides(model)):
        # Of two values, the other one: no block sees all positions.
        return None
    return f"rotates positions by {' and '.join(f'{theta:g}' for theta in found)}"


def _rope_scaling(value: Any, model: ModelSettings) -> str | None:
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


def _stretches(model: ModelSettings) -> set[tuple[str, float]]:
    """How positions are scaled, and by which factor, in all layers that rotate by them."""
    layers = [layer for layer in model.layers if type(layer).__name__ == "RotaryEmbedding"]
    return {(layer.rope_type, float(layer.scaling_factor)) for layer in layers}


def _rope_type(value: Any, model: ModelSettings) -> str | None:
    known = ["default", "linear", "llama3"]
    if _yarn_layers(model):
        known.append("yarn")
    if hasattr(model.backbone, "global_rope_partial_rotary_factor"):
        known.append("proportional")
    return None if value in known else "has no such scaling of positions"


def _yarn_layers(model: ModelSettings) -> list[Any]:
    layers = [layer for layer in model.layers if type(layer).__name__ == "RotaryEmbedding"]
    return [layer for layer in layers if layer.rope_type == "yarn"]


def _yarn(name: str) -> Callable[[Any, ModelSettings], str | None]:
    """A number of YaRN, where the backbone scales positions so; elsewhere its name is refused."""

    def rule(value: Any, model: ModelSettings) -> str | None:
        found = {getattr(layer, name) for layer in _yarn_layers(model)}
        return f"has {found.pop()} in it" if value is not None and found - {value} else None

    return rule


def _constant(name: str) -> Callable[[Any, ModelSettings], str | None]:
    """A number that layers have as an attribute of this name, and no converter sets."""

    def rule(value: Any, model: ModelSettings) -> str | None:
        found = {*model.attributes(name)}
        if value is None or found == {value}:
            return None
        return f"has {', '.join(map(str, sorted(found))) or 'none'}"

    return rule


def _experts_per_token(value: Any, model: ModelSettings) -> str | None:
    chosen = model.value("num_experts_per_tok")
    return None if value in (None, chosen) else f"chooses {chosen} (num_experts_per_tok)"


def _vision_rope_type(value: Any, model: ModelSettings) -> str | None:
    # That of two axes, which transformers 5 names where it was understood before.
    return None if value == "axial" else _rope_type(value, model)


def _tied(value: Any, model: ModelSettings) -> str | None:
    tied = model.attributes("tie_weights")
    if not model.generates or not tied or bool(value) in tied:
        return None
    return "always has a head of its own" if value else "always uses the embeddings as its head"


def _slides(model: ModelSettings) -> list[bool]:
    """Of each block of a backbone in which some slide, whether it does."""
    found = [getattr(o, "use_sliding_window_attention", None) for o in model.backbone.layers]
    return [slides for slides in found if slides is not None]


def _layer_types(value: Any, model: ModelSettings) -> str | None:
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
    windows = [o.sliding_window for o in model.backbone.layers if hasattr(o, "sliding_window")]
    if any(wanted) and windows:
        if wanted == [bool(own) for own in windows] or not (window or any(windows)):
            return None
        return (
            "lets other layers see a window only (set sliding_window to null if texts stay shorter)"
        )
    return "lets other layers see a window only" if any(wanted) else "has one kind of attention"


def _window(value: Any, model: ModelSettings) -> str | None:
    # As compared with transformers: the positions that its mask leaves are one more.
    longer = any(type(layer).__name__ == "GptOssAttention" for layer in model.layers)
    if not value or not longer:
        return None
    return f"sees {value + 1} positions (set it to null if texts stay shorter)"


def _sliding_window_pattern(value: Any, model: ModelSettings) -> str | None:
    slides = _slides(model)
    wanted = [bool((index + 1) % value) for index in range(len(slides))] if value else slides
    return None if wanted == slides else "lets other layers see a window only"


def _use_sliding_window(value: Any, model: ModelSettings) -> str | None:
    if not value or (model.value("max_window_layers") or 0) >= model.value("num_hidden_layers"):
        return None
    return (
        "lets all layers slide or none (set it to false if texts stay shorter than sliding_window)"
    )


def _n_inner(value: Any, model: ModelSettings) -> str | None:
    expected = 4 * model.value("n_embd", "hidden_size")
    return None if value in (None, expected) else f"has {expected}"


def _query_scale(value: Any, model: ModelSettings) -> str | None:
    found = set()
    for layer in model.layers:
        if "Attention" not in type(layer).__name__:
            continue  # A backbone may say what it does not hand on to its attention: Gemma's does.
        if hasattr(layer, "query_pre_attn_scalar"):
            found.add(layer.query_pre_attn_scalar)
        elif hasattr(layer, "query_head_dim_normalize"):
            own = layer.hidden_dim // layer.num_query_heads
            found.add(layer.head_dim if layer.query_head_dim_normalize else own)
    if value is None or not found or found == {value}:
        return None
    scales = " and ".join(str(scale) for scale in sorted(found))
    return (
        f"scales queries by {scales} (in presets of its own too: name one to quantize it as it is)"
    )


def _attention_bias(value: Any, model: ModelSettings) -> str | None:
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    parts = [layer for layer in model.layers if isinstance(layer, kinds)]
    found = any(layer.bias is not None for layer in parts if "attention" in layer.path)
    return None if bool(value) == found else f"has {'' if found else 'no '}biases in its attention"


def _cross_attention(value: Any, model: ModelSettings) -> str | None:
    encoder = dict(model.config).get("encoder") or {}
    expected = encoder.get("hidden_size")
    return None if value in (None, expected) else f"has {expected} there"


def _is_decoder(value: Any, model: ModelSettings) -> str | None:
    # Said of one half of a model that has both.
    halves = isinstance(dict(model.config).get("decoder"), NotedConfig)
    return None if not value or halves or model.generates else "lets all positions see each other"


def _position_embedding(value: Any, model: ModelSettings) -> str | None:
    expected = getattr(model.backbone, "position_embedding_type", "absolute")
    return None if value in (None, expected) else f"is made for {expected!r}"


def _rotary_factor(value: Any, model: ModelSettings) -> str | None:
    names = ("partial_rotary_factor", "global_rope_partial_rotary_factor")
    found = [getattr(model.backbone, name, None) for name in names]
    expected = [factor for factor in found if factor is not None] or [1.0]
    return None if value in (None, *expected) else f"rotates {expected[0]:g} of each head"


def _full_attention_interval(value: Any, model: ModelSettings) -> str | None:
    # What layer_types repeats; the converter's own without it.
    return None if value in (None, 4) or model.value("layer_types") else "has an interval of 4"


def _decoder_heads(value: Any, model: ModelSettings) -> str | None:
    expected = model.value("encoder_attention_heads", "num_attention_heads")
    return None if value in (None, expected) else f"has {expected} heads in every block"


def _must_be(expected: Any) -> Callable[[Any, ModelSettings], str | None]:
    def rule(value: Any, _model: ModelSettings) -> str | None:
        return None if value in (None, expected) else f"is made for {expected!r}"

    return rule


RULES: dict[str, Callable[[Any, ModelSettings], str | None]] = {
    **dict.fromkeys(EPSILON_KEYS, _epsilon),
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
    "sliding_window": _window,
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
    "beta_fast": _yarn("beta_fast"),
    "beta_slow": _yarn("beta_slow"),
    "truncate": _yarn("truncate"),
    "original_max_position_embeddings": _yarn("original_max_position_embeddings"),
    "initial_context_length": _yarn("original_max_position_embeddings"),
    "swiglu_alpha": _constant("alpha"),
    "swiglu_limit": _constant("limit"),
    "experts_per_token": _experts_per_token,
    "is_causal": _must_be(True),
    "is_decoder": _is_decoder,
    "decoder_attention_heads": _decoder_heads,
    "normalize_embedding": _must_be(True),
    "extra_pos_embeddings": _must_be(2),
}
"""For keys that must agree with the backbone: what it has instead; None if they agree."""

_VISION_RULES: dict[str, Callable[[Any, ModelSettings], str | None]] = {
    **dict.fromkeys(EPSILON_KEYS, _epsilon),
    **dict.fromkeys(("hidden_act", "hidden_activation"), _vision_activation),
    "rope_type": _vision_rope_type,
}
ENCODERS_RULES = {
    "vision_config": _VISION_RULES,
    "audio_config": {**_VISION_RULES, "hidden_act": _must_be("silu")},
}
"""The same for the encoders of images and sounds."""

ENCODERS_CONSTANTS = {"rope_theta": 10000.0}
"""What KerasHub's encoders compute with where no converter reads the key."""
