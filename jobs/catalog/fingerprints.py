"""What is known of a source's and of texts' files without reading them: the state of a request.

A state is compared with an earlier one to tell that something may have changed. It never proves
that nothing has: the plan of a run digests every byte that is read.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.canonical import sha256
from pipeline.errors import CalibrationTextError, SourceError
from pipeline.storage.local_store import file_version
from pipeline.storage.object_store import open_store
from pipeline.storage.user_files import find_given_files

# As `pipeline.planning.versions`, which needs JAX.
PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")
# What `pipeline.model.preset` takes for a part of the model.
_OTHERS = (
    *(".md", ".rst", "LICENSE"),
    *(".bin", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".pkl"),
)
_MOST_JSON_BYTES = 256 << 10

State = Mapping[str, str]
"""A token by file; another one as soon as the file was written again."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A state, and what finding it out cost.

    Attributes:
        state: token by file.
        bytes_read: of file contents; listings are not counted.
    """

    state: State
    bytes_read: int = 0


def source_state(url: str) -> Known:
    """The files of a preset that decide what the model is.

    All are known by size and version in their store; on a disk, where a version is no more than
    times, small JSON is known by its content.

    Raises:
        SourceError: there is no preset.
        StorageError: the store cannot be used.
    """
    store = open_store(url)
    is_on_disk = store.root_url.startswith("file://")
    state, bytes_read = {}, 0
    for name, version in store.versions().items():
        if name.endswith(_OTHERS):
            continue
        state[name] = version.token
        if is_on_disk and name.endswith(".json") and version.size_bytes <= _MOST_JSON_BYTES:
            content = store.get(name, at_most=_MOST_JSON_BYTES)
            bytes_read += len(content)
            state[name] = f"sha256:{sha256(content)}"
    if "config.json" not in state:
        raise SourceError(
            f"{url}: no config.json there; name the folder of a KerasHub preset or of a Hugging "
            "Face model"
        )
    return Known(state=state, bytes_read=bytes_read)


def texts_state(sources: Sequence[str]) -> Known:
    """The files of calibration or evaluation texts; of a data set of the hub only its name.

    Raises:
        CalibrationTextError: no such files.
    """
    state: dict[str, str] = {}
    for source in sources:
        if source.startswith("hf:"):
            state[source] = "by name"
            continue
        for file in find_given_files(source, error_type=CalibrationTextError):
            state[file] = _token(file)
    return Known(state=state)


def package_versions() -> State:
    """Of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _token(file: str) -> str:
    for scheme in ("file://", "local://"):
        if file.startswith(scheme):
            # Not through a store: people name their files as they like.
            return file_version(Path(file.removeprefix(scheme))).token
    folder, _, name = file.rpartition("/")
    return open_store(folder).version(name)
