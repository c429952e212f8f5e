"""The files of one model's preset, wherever they are stored.

JSON is read at once, since everything follows from it; weights only in ranges, and assets when
needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import DamagedObjectError, MissingObjectError, PipelineError, SourceError
from pipeline.storage.object_store import ObjectStore, open_store

CONFIG_FILE = "config.json"
"""The one file that every preset has: the backbone's class and arguments."""
TASK_FILE = "task.json"
INDEX_FILE = "model.weights.json"
"""Maps layers to weights files, for presets without a model.weights.h5."""
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX_FILE = "model.safetensors.index.json"
TASK_WEIGHTS_FILE = "task.weights.h5"
"""The variables that a task has in addition to its backbone's."""

_MAX_SMALL_BYTES = 64 << 20
_WEIGHTS = (".h5", ".safetensors")
# Weights for other frameworks, which are never copied into an artifact.
_FOREIGN = (".bin", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".pkl")


@dataclass(frozen=True, kw_only=True)
class PresetFiles:
    """The content of a preset's folder: plain data, small enough to send to workers."""

    url: str
    format: Literal["keras", "huggingface"]
    """As KerasHub saves presets, or with safetensors."""
    json_files: Mapping[str, bytes]
    """Content of each JSON file outside assets/, by name within the folder."""
    sizes: Mapping[str, int]
    """Bytes of each file, by name within the folder."""
    store: ObjectStore = field(repr=False)

    @property
    def assets(self) -> tuple[str, ...]:
        """Names of the small files that are neither weights nor in `json_files`: vocabularies."""
        return tuple(
            name
            for name in sorted(self.sizes)
            if name not in self.json_files
            and not name.endswith((*_WEIGHTS, *_FOREIGN))
            and self.sizes[name] <= _MAX_SMALL_BYTES
        )

    def parse(self, name: str) -> dict[str, Any]:
        """A JSON file's content.

        Raises:
            SourceError: missing, or not a JSON object.
        """
        if name not in self.json_files:
            raise SourceError(f"{self.url}: {name} is missing; the preset is incomplete")
        try:
            content = json.loads(self.json_files[name])
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.url}/{name}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise SourceError(f"{self.url}/{name}: expected a JSON object")
        return content

    def weight_map(self, name: str) -> dict[str, tuple[str, ...]]:
        """The weights files of each layer or tensor, as an index file lists them.

        Raises:
            SourceError: the index is missing or damaged, or names a file elsewhere.
        """
        found = self.parse(name).get("weight_map")
        if not isinstance(found, dict):
            raise SourceError(f"{self.url}/{name}: it lacks a weight_map")
        files = {}
        for key, listed in found.items():
            files[key] = tuple(listed if isinstance(listed, list) and listed else [listed])
            for file in files[key]:
                if not isinstance(file, str) or "/" in file:
                    raise SourceError(f"{self.url}/{name}: {file!r} is not a file beside it")
        return files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            SourceError: the file is missing, or shorter than when it was listed.
            StorageError: the store cannot be used.
        """
        if name not in self.sizes:
            raise SourceError(f"{self.url}: {name} is missing; the preset is incomplete")
        stop = self.sizes[name] if stop is None else stop
        try:
            return self.store.get_range(name, start, stop)
        except (DamagedObjectError, MissingObjectError) as error:
            raise SourceError(f"{error}; the source changed while in use, or is damaged") from None

    def copy_small_files(self, folder: Path) -> None:
        """Copy JSON and assets to a local folder, for readers of local files only."""
        for name in sorted({*self.json_files, *self.assets}):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.json_files.get(name) or self.read(name))


@contextmanager
def keras_errors(
    problem: str, remedy: str, folders: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Turn what Keras and KerasHub raise for bad input into a SourceError of one line.

    Args:
        folders: what to call each temporary folder that their message may name.
    """
    try:
        yield
    except PipelineError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        for folder, name in (folders or {}).items():
            reason = reason.replace(folder, name)
        raise SourceError(f"{problem} ({type(error).__name__}: {reason}); {remedy}") from error


def check_preset(store: ObjectStore) -> None:
    """Check that a store's root looks like a preset.

    Raises:
        SourceError: it has no config.json.
    """
    if not store.exists(CONFIG_FILE):
        raise SourceError(
            f"{store.root_url.removeprefix('file://')}: no {CONFIG_FILE} there; name the folder of "
            "a KerasHub preset or of a Hugging Face model"
        )


def read_preset(url: str) -> PresetFiles:
    """List a preset's folder and read its JSON.

    Raises:
        SourceError: there is no preset, or its format is unknown.
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
                    "allowed; is this a model's folder?"
                )
            json_files[name] = store.get(name, size=sizes[name])
    preset = PresetFiles(url=url, format="keras", json_files=json_files, sizes=sizes, store=store)
    config = preset.parse(CONFIG_FILE)
    if "registered_name" in config:
        return preset
    if "model_type" in config:
        return replace(preset, format="huggingface")
    raise SourceError(
        f"{url}/config.json: neither a KerasHub preset (no registered_name) nor a Hugging Face "
        "model (no model_type)"
    )
