"""Fingerprints of a source's and of texts' files, taken without reading large ones.

A fingerprint that differs from an earlier one means that something may have changed. An equal one
proves nothing: a run's plan digests every byte that is read.
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

# As in `pipeline.planning.versions`, which needs JAX.
PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")
# Files that `pipeline.model.preset` ignores.
_IGNORED = (
    *(".md", ".rst", "LICENSE"),
    *(".bin", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".pkl"),
)
_MAX_JSON_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The versions of some files.

    Attributes:
        tokens: by file; a file that is written again gets another one.
        bytes_read: of file contents, to find them out; listings do not count.
    """

    tokens: Mapping[str, str]
    bytes_read: int = 0


def source_fingerprint(url: str) -> Fingerprint:
    """Fingerprint the files of a preset that decide what the model is.

    A token is the size and version that the store reports. On a disk, where a version is only a
    timestamp, small JSON files are hashed instead.

    Raises:
        SourceError: no preset is there.
        StorageError: the store cannot be used.
    """
    store = open_store(url)
    is_on_disk = store.root_url.startswith("file://")
    tokens, bytes_read = {}, 0
    for name, version in store.versions().items():
        if name.endswith(_IGNORED):
            continue
        tokens[name] = version.token
        if is_on_disk and name.endswith(".json") and version.size_bytes <= _MAX_JSON_BYTES:
            content = store.get(name, at_most=_MAX_JSON_BYTES)
            bytes_read += len(content)
            tokens[name] = f"sha256:{sha256(content)}"
    if "config.json" not in tokens:
        raise SourceError(
            f"{url}: no config.json there; name the folder of a KerasHub preset or of a Hugging "
            "Face model"
        )
    return Fingerprint(tokens=tokens, bytes_read=bytes_read)


def texts_fingerprint(sources: Sequence[str]) -> Fingerprint:
    """Fingerprint calibration or evaluation texts; data sets of the hub by name only.

    Raises:
        CalibrationTextError: no such files.
    """
    tokens: dict[str, str] = {}
    for source in sources:
        if source.startswith("hf:"):
            tokens[source] = "by name"
            continue
        for file in find_given_files(source, error_type=CalibrationTextError):
            tokens[file] = _token(file)
    return Fingerprint(tokens=tokens)


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _token(file: str) -> str:
    for scheme in ("file://", "local://"):
        if file.startswith(scheme):
            # Not through a store, which would reject some file names.
            return file_version(Path(file.removeprefix(scheme))).token
    folder, _, name = file.rpartition("/")
    return open_store(folder).version(name)
