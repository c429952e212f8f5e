"""Folders of sentence-transformers: a language model, and how its output becomes one vector.

`modules.json` lists the steps. KerasHub's embedders pool and normalize; what they lack is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import SourceError
from pipeline.model.preset import CONFIG_FILE, PresetFiles

_MODULES_FILE = "modules.json"
_POOLING_FILE = "1_Pooling/config.json"
_POOLING = {
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
}
"""KerasHub's name of each way of pooling that it has, by the name in a pooling module's config."""


def is_sentence_transformer(preset: PresetFiles) -> bool:
    """Whether a folder is one of sentence-transformers, whatever its architecture generates."""
    return _MODULES_FILE in preset.json_files


def embedder_arguments(
    preset: PresetFiles, converter: ModuleType, backbone_json: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of KerasHub's text embedder beside its backbone.

    Args:
        converter: KerasHub's, for the model's architecture.

    Raises:
        SourceError: a step that KerasHub's embedder does not have.
    """
    arguments: dict[str, Any] = {}
    if hasattr(converter, "load_task_config"):
        with tempfile.TemporaryDirectory() as folder:
            # The converter reads pooling and normalization from local files.
            for name, content in sorted(preset.json_files.items()):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(content)
            arguments = converter.load_task_config(folder, preset.parse(CONFIG_FILE))
    if _POOLING_FILE in preset.json_files:
        arguments["pooling_mode"] = _pooling_mode(preset)
    # One of KerasHub's backbones has the dense layers of its embedding model inside.
    if is_sentence_transformer(preset) and not backbone_json["config"].get("is_embedding_model"):
        modules = json.loads(preset.json_files[_MODULES_FILE])
        kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
        other = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if other:
            raise SourceError(
                f"{preset.url}/{_MODULES_FILE}: a step {other[0]}, which KerasHub's embedders do "
                "not have; such a model cannot be quantized"
            )
    return arguments


def _pooling_mode(preset: PresetFiles) -> str:
    """How a pooling module pools: KerasHub's converters take what they do not know for another."""
    config = preset.parse(_POOLING_FILE)
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key in sorted(config) if key.startswith(prefix)]
    modes = [mode for mode in modes if config[prefix + mode]] or [str(config.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise SourceError(
            f"{preset.url}/{_POOLING_FILE}: pools by {' and '.join(modes)}, where KerasHub's "
            "embedders have one of mean, max, cls and lasttoken; such a model cannot be quantized"
        )
    return _POOLING[modes[0]]
