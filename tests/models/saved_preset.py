"""What KerasHub leaves wrong in a preset that it saves, put right in its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def complete(path: Path, forgotten: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Add what `Backbone.get_config` forgets, and say what the preset was made from.

    The origin takes the date's place in metadata.json: files depend on what they were made from,
    not on when. It is written last, so that only a complete preset has it.

    Args:
        path: the preset's folder.
        forgotten: arguments of the backbone.
        origin: what `made_from` will return.
    """
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["config"].update(forgotten)
    _write(path / "config.json", config)
    task = json.loads((path / "task.json").read_text(encoding="utf-8"))
    task["config"]["backbone"]["config"].update(forgotten)
    _write(path / "task.json", task)
    metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    del metadata["date_saved"]
    _write(path / "metadata.json", {**metadata, "origin": dict(origin)})


def made_from(path: Path) -> Any:
    """Return the origin of a complete preset, or None."""
    file = path / "metadata.json"
    if not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("origin")


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
