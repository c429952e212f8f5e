"""A model as its author left it: the files of one preset, wherever they are stored.

JSON is read at once, since everything follows from it; weights only by ranges, and assets when
they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import DamagedObjectError, MissingObjectError, SourceError
from pipeline.storage.object_store import ObjectStore, open_store

_MAX_SMALL_BYTES = 64 << 20
_WEIGHTS = (".h5", ".safetensors")
# Weights of other frameworks beside those that we read; never part of a preset of ours.
_FOREIGN = (".bin", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".pkl")


@dataclass(frozen=True, kw_only=True)
class PresetFiles:
    """What a preset's folder holds. Small, and plain data: it may travel to workers.

    Attributes:
        url: the folder.
        format: "keras" as KerasHub saves it, or "huggingface" with safetensors.
        json_files: content of each JSON file outside assets/, by name within the folder.
        sizes: bytes of each file, by name within the folder.
        store: where they are.
    """

    url: str
    format: Literal["keras", "huggingface"]
    json_files: Mapping[str, bytes]
    sizes: Mapping[str, int]
    store: ObjectStore = field(repr=False)

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of what is neither weights nor JSON read already: vocabularies, mostly."""
        other = (*_WEIGHTS, *_FOREIGN)
        return tuple(
            name
            for name in sorted(self.sizes)
            if name not in self.json_files
            and not name.endswith(other)
            and self.sizes[name] <= _MAX_SMALL_BYTES
        )

    def parse(self, name: str) -> dict[str, Any]:
        """A JSON file's content.

        Raises:
            SourceError: missing, or no JSON object.
        """
        if name not in self.json_files:
            raise SourceError(f"{self.url}: {name} is missing; the preset is not complete")
        try:
            content = json.loads(self.json_files[name])
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.url}/{name}: no valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise SourceError(f"{self.url}/{name}: expected a JSON object")
        return content

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, all of them or an error.

        Raises:
            SourceError: missing, or shorter than it was listed.
            StorageError: the store cannot be used.
        """
        if name not in self.sizes:
            raise SourceError(f"{self.url}: {name} is missing; the preset is not complete")
        stop = self.sizes[name] if stop is None else stop
        try:
            return self.store.get_range(name, start, stop)
        except (DamagedObjectError, MissingObjectError) as error:
            raise SourceError(f"{error}; the source changed while in use, or is damaged") from None

    def copy_small_files(self, folder: Path) -> None:
        """Write JSON and assets below a local folder, for readers that know only local files."""
        for name in sorted({*self.json_files, *self.assets}):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.json_files.get(name) or self.read(name))


PRESET_KEY = "config.json"
"""What every preset has."""


def check_preset(store: ObjectStore) -> None:
    """Make sure that there is a preset at a store's root, as far as a glance tells.

    Raises:
        SourceError: there is none.
    """
    if not store.exists(PRESET_KEY):
        raise SourceError(
            f"{store.root_url.removeprefix('file://')}: no {PRESET_KEY} there; name the folder of "
            "a KerasHub preset or of a Hugging Face model"
        )


def read_preset(url: str) -> PresetFiles:
    """List a preset's folder and read its JSON.

    Args:
        url: any URL that `open_store` takes, such as s3://bucket/models/llama, or a local path.

    Raises:
        SourceError: nothing there, or no preset of a known kind.
        StorageError: the store cannot be used.
    """
    store = open_store(url)
    check_preset(store)
    names = store.list()
    sizes = {name: store.size(name) for name in names}
    json_files = {}
    for name in names:
        if name.endswith(".json") and not name.startswith("assets/"):
            if sizes[name] > _MAX_SMALL_BYTES:
                raise SourceError(
                    f"{url}/{name}: {sizes[name]} bytes of JSON, where {_MAX_SMALL_BYTES} are "
                    "allowed; is it a model's?"
                )
            json_files[name] = store.get(name, size=sizes[name])
    preset = PresetFiles(url=url, format="keras", json_files=json_files, sizes=sizes, store=store)
    config = preset.parse("config.json")
    if "registered_name" in config:
        return preset
    if "model_type" in config:
        return replace(preset, format="huggingface")
    raise SourceError(
        f"{url}/config.json: neither a KerasHub preset (no registered_name) nor a Hugging Face "
        "model (no model_type)"
    )
