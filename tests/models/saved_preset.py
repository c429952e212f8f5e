"""Complete the JSON of a preset that KerasHub saves incompletely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def complete(path: Path, forgotten: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Add what `Backbone.get_config` forgets, and record what the preset was made from.

    The origin replaces the date in metadata.json, so that the files depend only on what they were
    made from. It is written last: a preset that has an origin is complete.

    Args:
        path: the preset's folder.
        forgotten: arguments of the backbone, with their values.
        origin: the value that `made_from` will return.
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
