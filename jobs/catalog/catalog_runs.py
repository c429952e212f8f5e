"""The runs that a catalog asks for, with the fingerprints of the files that each is made from."""

from __future__ import annotations

import functools
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.catalog.catalog_file import Catalog, Entry
from jobs.catalog.composition import Composition
from jobs.catalog.entries import Resources
from jobs.catalog.request import ComposedOf, Request
from jobs.catalog.source_files import SourceFingerprints
from pipeline.errors import CalibrationTextError, PipelineError
from pipeline.executor.protocol import ComputeSpec
from pipeline.export.settings import ExportSettings
from pipeline.recipe.recipe import Recipe
from pipeline.storage.local_store import file_version
from pipeline.storage.object_store import open_store
from pipeline.storage.user_files import find_given_files

# As in `pipeline.machine.versions`, which needs JAX.
PACKAGES = ("quantfleet", "jax", "jaxlib", "keras", "keras-hub", "numpy", "ml-dtypes", "h5py")
_NUM_THREADS = 32
_ENTRIES_AT_ONCE = 512
"""Whose sources are listed together, and then held."""


def run_name(model: str, recipe_name: str) -> str:
    """What people call one run of a catalog."""
    return f"{model} × {recipe_name}"


@dataclass(frozen=True, kw_only=True)
class CatalogRun:
    """One run that a catalog asks for.

    Attributes:
        request: None where its files cannot be fingerprinted.
        recipe: a composition's, too, has a name.
        problem: why not.
        bytes_read: to fingerprint the source; counted for the first run that uses it.
    """

    entry: Entry
    recipe: Recipe | Composition
    request: Request | None = None
    problem: PipelineError | None = None
    bytes_read: int = 0

    @property
    def name(self) -> str:
        return self._name_of(self.recipe)

    @property
    def giver_names(self) -> tuple[str, ...]:
        """Of the runs that a composition takes blocks of; none for all others."""
        recipes = self.recipe.recipes if isinstance(self.recipe, Composition) else ()
        return tuple(map(self._name_of, recipes))

    def _name_of(self, recipe: Recipe | Composition) -> str:
        return run_name(self.entry.name, recipe.name)


def catalog_runs(catalog: Catalog) -> Iterator[CatalogRun]:
    """Fingerprint the files of each model and yield its runs, in the catalog's order.

    A model whose files cannot be read does not hold up the others. Each source and each set of
    texts is fingerprinted once, however many entries name it; a source's fingerprint is kept as
    long as an entry that needs it is still to come.
    """
    versions = package_versions()
    needed = Counter(url for entry in catalog.entries for url in _source_urls(entry))
    fingerprints = SourceFingerprints()
    counted: set[str] = set()
    # Of a recipe that ten thousand entries name there is one.
    recipe_values: dict[int, dict[str, Any]] = {}

    def values_of(recipe: Recipe) -> dict[str, Any]:
        if id(recipe) not in recipe_values:
            recipe_values[id(recipe)] = recipe.to_dict()
        return recipe_values[id(recipe)]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        @functools.cache
        def texts(given: tuple[str, ...]) -> Future[dict[str, str]]:
            return pool.submit(texts_fingerprint, given)

        for start in range(0, len(catalog.entries), _ENTRIES_AT_ONCE):
            entries = catalog.entries[start : start + _ENTRIES_AT_ONCE]
            fingerprints.find([url for entry in entries for url in _source_urls(entry)], pool)
            for entry in entries:
                results: tuple[Recipe | Composition, ...] = (*entry.recipes, *entry.compositions)
                for recipe in results:
                    try:
                        source, bytes_read = fingerprints.of(entry.preset)
                        request = _request(
                            entry,
                            recipe,
                            values_of,
                            source=source,
                            texts=texts(_calibrated_on(recipe)).result(),
                            measured_on=texts(
                                recipe.measure_texts if isinstance(recipe, Composition) else ()
                            ).result(),
                            evaluation=texts(entry.settings.evaluated_urls).result()
                            | texts(entry.settings.tasks or ()).result(),
                            versions=versions,
                            exports_like={
                                f"{url}/{name}": token
                                for url in _like_urls(entry)
                                for name, token in fingerprints.of(url)[0].items()
                            },
                        )
                    except PipelineError as problem:
                        yield CatalogRun(entry=entry, recipe=recipe, problem=problem)
                        continue
                    cost = 0 if entry.preset in counted else bytes_read
                    counted.add(entry.preset)
                    yield CatalogRun(entry=entry, recipe=recipe, request=request, bytes_read=cost)
                needed.subtract(urls := _source_urls(entry))
                done = [url for url in urls if not needed[url]]
                fingerprints.forget(done)
                counted.difference_update(done)


def _source_urls(entry: Entry) -> tuple[str, ...]:
    """The folders that a run's fingerprints need, each once."""
    return tuple(dict.fromkeys((entry.preset, *_like_urls(entry))))


def _calibrated_on(recipe: Recipe | Composition) -> tuple[str, ...]:
    """The files that a recipe, or those recipes of a composition that calibrate, do so on."""
    recipes = recipe.recipes if isinstance(recipe, Composition) else (recipe,)
    found = (one.calibration for one in recipes if one.needs_calibration)
    calibration = next(found, None)
    return () if calibration is None else calibration.sources


def _request(
    entry: Entry,
    recipe: Recipe | Composition,
    values_of: Callable[[Recipe], dict[str, Any]],
    measured_on: dict[str, str],
    **fingerprints: dict[str, str],
) -> Request:
    settings = entry.settings
    composed_of = None
    if isinstance(recipe, Composition):
        composed_of = ComposedOf(
            target=recipe.target,
            recipes=tuple(map(values_of, recipe.recipes)),
            measure_texts=recipe.measure_texts,
            measure_windows=recipe.measure_windows,
            by_layers=recipe.by_layers,
            measured_on=measured_on,
        )
    return Request(
        model=entry.name,
        recipe_name=recipe.name,
        aliases=entry.aliases,
        source_url=entry.preset,
        recipe={} if isinstance(recipe, Composition) else values_of(recipe),
        composed_of=composed_of,
        evaluation_texts=settings.evaluated_on.texts,
        evaluation_sets=dict(settings.evaluated_on.sets),
        evaluation_windows=settings.windows,
        tasks=settings.tasks or (),
        gate=settings.gate,
        needs=_needs(settings.resources),
        keep=settings.retention.keep,
        exports=tuple(
            ExportSettings(format=one.format, dtype=one.dtype, like_url=one.like)
            for one in dict.fromkeys(settings.export)
        ),
        **fingerprints,
    )


@functools.cache
def _needs(resources: Resources) -> ComputeSpec:
    return resources.needs


def _like_urls(entry: Entry) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.like for one in entry.settings.export if one.like is not None))


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
