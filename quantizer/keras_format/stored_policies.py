"""Which quantized layers of a model stock Keras gets back from its config, found by a round trip.

Keras stores the policy of every layer whose config it writes: those of a Sequential or functional
model. A composite layer, such as MultiHeadAttention, writes its own config alone, and builds its
inner layers from that; their policies are only kept if it holds them in a `DTypePolicyMap`, by
path, and hands its policy down. Whether it does, and whether the paths are the same in another
process, is tried on a copy of the model without weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
from keras.src.models.functional import Functional
from keras.src.saving.serialization_lib import ObjectSharingScope

from quantizer.errors import LayerError
from quantizer.keras_format.generated_names import ManyMade, apart
from quantizer.keras_format.model_layers import walk

# Their configs hold those of their layers, each with its own policy.
_OF_WHOLE_CONFIGS = (keras.Sequential, Functional)
_LOST = (
    "stock Keras would not store its format: what contains it keeps no dtype policies of its "
    "inner layers, or leaves them without names of their own"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What Keras has to know of a quantized layer before it loads its variables."""

    policy: keras.DTypePolicy
    config: Any
    """The layer's `quantization_config`."""
    is_default: bool
    """Whether the policy alone means this config."""


PolicyMaps: TypeAlias = Sequence[tuple[keras.layers.Layer, keras.dtype_policies.DTypePolicyMap]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFormats:
    """What has to be done so that Keras stores the formats of layers, and where it cannot.

    Attributes:
        maps: composite layers, and the policies that they have to hold for their inner layers.
        lost: why not, by id of each layer whose format stock Keras would not store.
    """

    maps: PolicyMaps
    lost: Mapping[int, str]

    def apply(self) -> None:
        """Let composite layers hold the policies, so that Keras stores them."""
        for layer, policy_map in self.maps:
            layer._dtype_policy = policy_map


def stored_formats(model: keras.Model, formats: Mapping[int, Format]) -> StoredFormats:
    """Find out which layers would come back in their format once the model is saved and loaded.

    Args:
        formats: of the layers that are to be quantized, or are, by `id(layer)`.

    Raises:
        LayerError: Keras cannot make the model from its config at all.
    """
    kept = _kept(model, formats, ())
    maps: PolicyMaps = ()
    needy = formats.keys() - kept
    if needy:
        maps = _policy_maps(model, formats, needy)
        kept = _kept(model, formats, maps)
        kept_formats = {key: formats[key] for key in formats if key in kept}
        maps = _policy_maps(model, kept_formats, needy & kept)
    return StoredFormats(maps=maps, lost={key: _LOST for key in formats if key not in kept})


def _policy_maps(model: keras.Model, formats: Mapping[int, Format], needy: Set[int]) -> PolicyMaps:
    """Maps of policies by path for the composite layers around those in need of one."""
    layers = [(layer, parents) for layer, parents in walk([model]) if id(layer) in formats]
    found = {
        id(parent): (parent, _as_map(parent._dtype_policy))
        for layer, parents in layers
        for parent in parents
        if id(layer) in needy and type(parent) not in _OF_WHOLE_CONFIGS
    }
    for layer, parents in layers:
        for parent in parents:
            if id(parent) in found:
                policies = found[id(parent)][1]
                if layer.path in policies:
                    del policies[layer.path]
                policies[layer.path] = formats[id(layer)].policy
    return tuple(found.values())


def _as_map(policy: Any) -> keras.dtype_policies.DTypePolicyMap:
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return keras.dtype_policies.DTypePolicyMap(policy.default_policy.name, dict(policy))
    return keras.dtype_policies.DTypePolicyMap(policy.name)


def _kept(model: keras.Model, formats: Mapping[int, Format], maps: PolicyMaps) -> set[int]:
    """The layers that come back in their format, whatever else the process has built."""
    custom = {
        type(layer).__name__: type(layer)
        for layer, _ in walk([model])
        if type(layer).__module__.partition(".")[0] != "keras"
    }
    try:
        with _formats_set(model, formats, maps), ObjectSharingScope():
            config = keras.saving.serialize_keras_object(model)
        # What a model was compiled with says nothing about its layers.
        config.pop("compile_config", None)
        stored = json.dumps(config)
        kept = set(formats)
        for made in (None, ManyMade()):
            with (
                apart(made),
                keras.StatelessScope(initialize_variables=False),
                ObjectSharingScope(),
            ):
                # The config was made from a live model just now: it runs no other code.
                copy = keras.saving.deserialize_keras_object(
                    json.loads(stored), custom_objects=custom, safe_mode=False
                )
                kept &= set(_same(model, copy, formats))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LayerError(
            f"{model.name}: stock Keras cannot make this model from its config, so that it cannot "
            f"be saved ({type(error).__name__}: {reason}); give its classes get_config and "
            "from_config"
        ) from error
    return kept


def _same(model: keras.Model, copy: Any, formats: Mapping[int, Format]) -> Iterator[int]:
    ours, theirs = ([layer for layer, _ in walk([root])] for root in (model, copy))
    if [type(layer) for layer in ours] != [type(layer) for layer in theirs]:
        raise ValueError("it comes back with other layers")
    for layer, other in zip(ours, theirs, strict=True):
        wanted = formats.get(id(layer))
        if wanted is None:
            continue
        policy = other._dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            policy = policy[other.path]
        config = other.quantization_config
        same_config = wanted.is_default if config is None else _json(config) == _json(wanted.config)
        if policy.name == wanted.policy.name and same_config:
            yield id(layer)


def _json(config: Any) -> str:
    return json.dumps(keras.saving.serialize_keras_object(config))


@contextmanager
def _formats_set(
    model: keras.Model, formats: Mapping[int, Format], maps: PolicyMaps
) -> Iterator[None]:
    """Let layers that may still be in float speak of themselves as quantized."""
    with ExitStack() as undo:
        for layer, _ in walk([model]):
            if id(layer) in formats:
                wanted = formats[id(layer)]
                _set(layer, "_dtype_policy", wanted.policy, undo)
                _set(layer, "quantization_config", wanted.config, undo)
        for layer, policy_map in maps:
            _set(layer, "_dtype_policy", policy_map, undo)
        yield


def _set(layer: keras.layers.Layer, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, layer, name, getattr(layer, name))
    setattr(layer, name, value)
