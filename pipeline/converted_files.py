"""A Hugging Face model's small files as KerasHub saves them: config, task, tokenizer, assets."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.preset import PresetFiles
from pipeline.skeleton import Skeleton


def converted_files(preset: PresetFiles, skeleton: Skeleton) -> dict[str, bytes]:
    """By name; the tokenizer is converted by KerasHub's own code.

    Args:
        preset: of kind "huggingface".
        skeleton: built from it, in the model's own dtype.
    """
    files = {"config.json": _json(skeleton.backbone_json)}
    if skeleton.task is None:
        return files
    assert skeleton.task_json is not None
    files["task.json"] = _json(skeleton.task_json)
    kind = skeleton.task.preprocessor_cls
    with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as target:
        preset.copy_small_files(Path(source))
        kind.from_preset(source).save_to_preset(target)
        for path in sorted(Path(target).rglob("*")):
            if path.is_file():
                name = path.relative_to(target).as_posix()
                files.setdefault(name, path.read_bytes())
    return files


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=4) + "\n").encode("ascii")
