"""Which classes a preset's JSON may name. Keras' own safe mode lets more through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import keras_hub

from pipeline.errors import SourceError

_TRUSTED = ("keras", "keras_hub")
# Where Keras keeps activations.
_FUNCTIONS = ("builtins", "keras.activations", "keras.ops", "keras")
# Classes of Keras itself that run what their config says.
_RUN_CODE = frozenset(
    {"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"}
)


def check_trusted(content: Any, where: str) -> None:
    """Refuse objects of other packages, and those of Keras that run code from their config.

    Args:
        content: parsed JSON.
        where: file, for the message.

    Raises:
        SourceError: it holds such an object, at whatever depth.
    """
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "class_name" in item:
                _check_class(item, where)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _check_class(item: Mapping[str, Any], where: str) -> None:
    # Keras joins module and name, so that a name may itself hold dots.
    name, module = str(item["class_name"]), str(item.get("module") or "keras")
    if name == "function":
        trusted = module in _FUNCTIONS and isinstance(item.get("config"), str)
    else:
        trusted = module.partition(".")[0] in _TRUSTED
    if not trusted or name.rpartition(".")[2] in _RUN_CODE:
        raise SourceError(
            f"{where}: refuses {name!r} of module {module!r}; a source may hold only "
            "classes of keras and keras_hub that run no code of its own"
        )


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def registered_class(config: Mapping[str, Any], parent: type, where: str) -> type[Any]:
    """The KerasHub class that a serialized object names.

    Args:
        config: the object, as Keras serializes it.
        parent: what it must be a kind of.
        where: file, for the message.

    Raises:
        SourceError: another class, or one that KerasHub does not have.
    """
    registered_name = str(config.get("registered_name"))
    found = keras.saving.get_registered_object(registered_name)
    if isinstance(found, type) and issubclass(found, parent) and _package(found) in _TRUSTED:
        return found
    raise SourceError(
        f"{where}: {registered_name!r} is no {parent.__name__} of KerasHub "
        f"{keras_hub.__version__}; only KerasHub's own models can be quantized"
    )
