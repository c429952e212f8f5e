"""The files of one model's preset, wherever they are stored.

JSON is read at once, since everything follows from it; weights only in ranges, and assets when
needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


_PROMPTING = ("chat_template.jinja", "generation_config.json")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_DOCUMENTATION = (".md", ".rst")


def decides_model(name: str) -> bool:
    """Whether a file of a preset's folder has a part in what the model computes.

    Weights for other frameworks, documentation and licenses have none: a new wording of a license
    is no reason to quantize a model again.
    """
    return not (name.endswith((*_FOREIGN, *_DOCUMENTATION)) or is_legal(name))


def is_legal(name: str) -> bool:
    """Whether a file is a license or a notice."""
    return name.startswith(_LEGAL) or name.endswith("LICENSE")


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
    stored_json: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Content of the JSON files that are not in `json_files` as they are stored."""

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

    @property
    def foreign_weights(self) -> tuple[str, ...]:
        """Names of weights files for other frameworks."""
        return tuple(name for name in sorted(self.sizes) if name.endswith(_FOREIGN))

    def in_dtype(self, dtype: str | None) -> PresetFiles:
        """The same model with its variables in another dtype; in its own if None."""
        if dtype is None:
            return self
        config = self.parse(CONFIG_FILE)
        if self.format == "huggingface":
            config = {key: value for key, value in config.items() if key != "dtype"}
            config["torch_dtype"] = dtype
        elif isinstance(config.get("config"), dict) and not _is_quantized(config["config"]):
            # In the form in which Keras saves it. Quantized ones are refused later.
            policy = {"class_name": "DTypePolicy", "config": {"name": dtype}}
            config["config"]["dtype"] = {"module": "keras", **policy, "registered_name": None}
        changed = {CONFIG_FILE: json.dumps(config, indent=4).encode()}
        return replace(
            self,
            json_files={**self.json_files, **changed},
            stored_json={name: self.json_files[name] for name in changed},
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

    def accompanying(self) -> dict[str, bytes]:
        """Licenses, and how to prompt and generate: what belongs to any form of the model."""
        names = sorted(name for name in self.sizes if "/" not in name)
        names = [n for n in names if is_legal(n) or n in _PROMPTING]
        names = [n for n in names if self.sizes[n] <= _MAX_SMALL_BYTES]
        return {n: self.json_files.get(n) or self.read(n) for n in names}

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


def _is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a backbone was saved with quantized layers."""
    policy = config.get("dtype")
    is_map = isinstance(policy, dict) and policy.get("class_name") == "DTypePolicyMap"
    name = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
    return is_map or "_from_" in str(name)


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
        where = store.root_url.removeprefix("file://")
        raise SourceError(
            f"{where}: no {CONFIG_FILE} there{_found_instead(store.list())}; name the folder of a "
            "KerasHub preset or of a Hugging Face model"
        )


# What folders without a model of their own hold, and what to do.
_OTHER_KINDS = {
    "adapter_config.json": "an adapter; merge it into the model that it was made for",
    "model_index.json": "a pipeline of models for images, which cannot be quantized",
    ".gguf": "a GGUF file, already quantized; start from the model that it was made from",
    ".keras": "a Keras model in one file; save it with KerasHub's save_to_preset",
    "saved_model.pb": "a TensorFlow SavedModel; start from the model that it was made from",
}


def _found_instead(names: Sequence[str]) -> str:
    for kind, meaning in _OTHER_KINDS.items():
        if any(name.endswith(kind) for name in names):
            return f", but {meaning}"
    inside = sorted(name for name in names if name.endswith(f"/{CONFIG_FILE}"))
    if inside:
        return f", but in its folder {inside[0].removesuffix(f'/{CONFIG_FILE}')}"
    return f", only {', '.join(names[:3])}" if names else ": the folder is empty or missing"


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
    keys = ", ".join(sorted(config)[:5]) or "nothing"
    raise SourceError(
        f"{url}/{CONFIG_FILE}: neither a KerasHub preset (no registered_name) nor a Hugging Face "
        f"model (no model_type); it has {keys}; name a model's own folder"
    )
