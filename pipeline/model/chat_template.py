"""Where a model keeps its chat template, and the special tokens that the template names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.calibration.chat import ChatTemplate
from pipeline.errors import SourceError
from pipeline.model.preset import PresetFiles

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def find_chat_template(preset: PresetFiles, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """The chat template in a preset's folder.

    Args:
        special_tokens: by their names in templates, where the folder names none.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    config = preset.parse(_CONFIG_FILE) if _CONFIG_FILE in preset.json_files else {}
    found = {f"{name}_token": config.get(f"{name}_token") for name in _SPECIAL_TOKENS}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in found.items()
    }
    tokens = dict(special_tokens)
    tokens |= {name: value for name, value in contents.items() if isinstance(value, str)}
    if _TEMPLATE_FILE in preset.sizes:
        where = f"{preset.url}/{_TEMPLATE_FILE}"
        try:
            source: Any = preset.read(_TEMPLATE_FILE).decode("utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    else:
        where = f"{preset.url}/{_CONFIG_FILE}"
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {
                entry.get("name"): entry.get("template")
                for entry in source
                if isinstance(entry, dict)
            }
            source = named.get("default")
    if not isinstance(source, str):
        raise SourceError(
            f"{preset.url}: the model has no chat template, neither {_TEMPLATE_FILE} nor a "
            f"chat_template in {_CONFIG_FILE}; copy the {_TEMPLATE_FILE} of the original model "
            "there, or set calibration.chat to false to take the messages' contents alone"
        )
    return ChatTemplate(where=where, source=source, special_tokens=tokens)
