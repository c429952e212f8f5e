"""Turns a catalog into requests, with fingerprints of the files that it names as they are now.

A fingerprint that differs from an earlier one means that something may have changed. An equal one
proves nothing: a run's plan digests every byte that is read.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.catalog.catalog_file import Catalog, Entry
from jobs.catalog.request import Request
from pipeline.canonical import sha256
from pipeline.errors import CalibrationTextError, PipelineError, SourceError
from pipeline.executor.protocol import ComputeSpec
from pipeline.recipe.recipe import Recipe
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
_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class CatalogRun:
    """One run that a catalog asks for.

    Attributes:
        request: None where its files cannot be fingerprinted.
        problem: why not.
        bytes_read: to fingerprint the source; counted for the first run that uses it.
    """

    entry: Entry
    recipe: Recipe
    request: Request | None = None
    problem: PipelineError | None = None
    bytes_read: int = 0

    @property
    def name(self) -> str:
        return f"{self.entry.name} × {self.recipe.name}"


def catalog_runs(catalog: Catalog) -> Iterator[CatalogRun]:
    """Fingerprint the files of each model and yield its runs, in the catalog's order.

    A model whose files cannot be read does not hold up the others. Each source and each set of
    texts is fingerprinted once, however many entries name it.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # All sources at once: the stores' latency adds up otherwise.
        urls = dict.fromkeys(entry.preset for entry in catalog.entries)
        sources = {url: pool.submit(source_fingerprint, url) for url in urls}

        @functools.cache
        def texts(given: tuple[str, ...]) -> Future[dict[str, str]]:
            return pool.submit(texts_fingerprint, given)

        versions = package_versions()
        counted: set[str] = set()
        for entry in catalog.entries:
            for recipe in entry.recipes:
                try:
                    source, bytes_read = sources[entry.preset].result()
                    calibration = recipe.calibration if recipe.needs_calibration else None
                    request = _request(
                        entry,
                        recipe,
                        source=source,
                        texts=texts(() if calibration is None else calibration.texts).result(),
                        evaluation=texts(entry.settings.evaluate_on or ()).result(),
                        versions=versions,
                    )
                except PipelineError as problem:
                    yield CatalogRun(entry=entry, recipe=recipe, problem=problem)
                    continue
                cost = 0 if entry.preset in counted else bytes_read
                counted.add(entry.preset)
                yield CatalogRun(entry=entry, recipe=recipe, request=request, bytes_read=cost)


def _request(entry: Entry, recipe: Recipe, **fingerprints: dict[str, str]) -> Request:
    settings, resources = entry.settings, entry.settings.resources
    memory = resources.memory
    return Request(
        model=entry.name,
        recipe_name=recipe.name,
        aliases=entry.aliases,
        source_url=entry.preset,
        recipe=recipe.to_dict(),
        evaluation_texts=settings.evaluate_on or (),
        evaluation_windows=settings.windows,
        gate=settings.gate,
        needs=ComputeSpec(
            workers=resources.workers,
            threads=resources.threads,
            device=resources.device,
            memory_bytes=None if memory is None else int(memory),
        ),
        keep=settings.retention.keep,
        **fingerprints,
    )


def source_fingerprint(url: str) -> tuple[dict[str, str], int]:
    """Fingerprint the files of a preset that decide what the model is.

    A token is the size and version that the store reports. On a disk, where a version is only a
    timestamp, small JSON files are hashed instead.

    Returns:
        A token for each file, and how many bytes of content were read.

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
    return tokens, bytes_read


def texts_fingerprint(sources: Sequence[str]) -> dict[str, str]:
    """A token for each file of calibration or evaluation texts; data sets of the hub by name only.

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
    return tokens


def _token(file: str) -> str:
    for scheme in ("file://", "local://"):
        if file.startswith(scheme):
            # Not through a store, which would reject some file names.
            return file_version(Path(file.removeprefix(scheme))).token
    folder, _, name = file.rpartition("/")
    return open_store(folder).version(name)


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
