"""The content of a Hugging Face config.json, as KerasHub's converters read it, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


_DECODED = ("mxfp4",)
"""Quantized forms that KerasHub's converters read: GPT-OSS's is published in it. Another's finds
none of the tensors that it asks for."""


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
    if (config.get("quantization_config") or {}).get("quant_method") in _DECODED:
        del config["quantization_config"]
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


EPSILON_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")


def taken_over(config: NotedConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone that its converter forgets.

    Args:
        parameters: of the backbone's class, by name.
    """
    forgotten: dict[str, Any] = {}
    always_slides = not any(name.startswith("use_sliding_window") for name in parameters)
    unused = dict(config).get("use_sliding_window") is False
    if unused and always_slides and "sliding_window_size" in parameters:
        forgotten["sliding_window_size"] = None
    found = [key for key in EPSILON_KEYS if key in config and key not in config.keys_read]
    if len(found) != 1 or "layer_norm_epsilon" not in parameters:
        return forgotten
    return {**forgotten, "layer_norm_epsilon": config[found[0]]}
