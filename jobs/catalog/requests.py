"""Turns a catalog into requests, given the files that it names as they are now."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.catalog.catalog_file import Catalog, Entry
from jobs.catalog.fingerprints import (
    Fingerprint,
    package_versions,
    source_fingerprint,
    texts_fingerprint,
)
from jobs.catalog.request import Gate, Request
from pipeline.errors import PipelineError
from pipeline.executor.protocol import ComputeSpec
from pipeline.recipe.recipe import Recipe

_NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class CatalogRun:
    """One run that a catalog asks for.

    Attributes:
        entry: the catalog's model.
        recipe: one of its recipes.
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
        """For people."""
        return f"{self.entry.name} × {self.recipe.name}"


def catalog_runs(catalog: Catalog) -> Iterator[CatalogRun]:
    """Fingerprint the files of each model and yield its runs, in the catalog's order.

    A model whose files cannot be read does not hold up the others. Each source and each set of
    texts is fingerprinted once, however many entries name it.
    """
    fingerprints = _Fingerprints(dict.fromkeys(entry.preset for entry in catalog.entries))
    versions = package_versions()
    for entry in catalog.entries:
        for recipe in entry.recipes:
            try:
                source, bytes_read = fingerprints.source(entry.preset)
                request = _request(entry, recipe, source, versions, fingerprints)
            except PipelineError as problem:
                yield CatalogRun(entry=entry, recipe=recipe, problem=problem)
            else:
                yield CatalogRun(entry=entry, recipe=recipe, request=request, bytes_read=bytes_read)


def _request(
    entry: Entry,
    recipe: Recipe,
    source: Fingerprint,
    versions: dict[str, str],
    fingerprints: _Fingerprints,
) -> Request:
    settings, values = entry.settings, recipe.to_dict()
    calibration_texts = tuple((values["calibration"] or {}).get("texts", ()))
    evaluation_texts = settings.evaluate_on or ()
    gate, resources = settings.gate, settings.resources
    return Request(
        model=entry.name,
        recipe_name=recipe.name,
        aliases=entry.aliases,
        source_url=entry.preset,
        recipe=values,
        evaluation_texts=evaluation_texts,
        evaluation_windows=settings.windows,
        gate=None if gate is None else Gate(**gate.model_dump()),
        needs=ComputeSpec(
            workers=resources.workers,
            threads=resources.threads,
            device=resources.device,
            memory_bytes=None if resources.memory is None else int(resources.memory),
        ),
        keep=settings.retention.keep,
        source=dict(source.tokens),
        texts=dict(fingerprints.texts(calibration_texts).tokens),
        evaluation=dict(fingerprints.texts(evaluation_texts).tokens),
        versions=versions,
    )


class _Fingerprints:
    """The fingerprints taken for one catalog."""

    def __init__(self, source_urls: Collection[str]) -> None:
        """Fingerprint many sources at once: the stores' latency adds up otherwise."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = pool.map(_source_or_problem, source_urls)
            self._sources = dict(zip(source_urls, found, strict=True))
        self._counted: set[str] = set()
        self._texts: dict[tuple[str, ...], Fingerprint | PipelineError] = {}

    def source(self, url: str) -> tuple[Fingerprint, int]:
        """A source's fingerprint, and what it cost if this is the first request for it."""
        found = self._sources[url]
        if isinstance(found, PipelineError):
            raise found
        cost = 0 if url in self._counted else found.bytes_read
        self._counted.add(url)
        return found, cost

    def texts(self, sources: tuple[str, ...]) -> Fingerprint:
        if sources not in self._texts:
            try:
                self._texts[sources] = texts_fingerprint(sources)
            except PipelineError as problem:
                self._texts[sources] = problem
        found = self._texts[sources]
        if isinstance(found, PipelineError):
            raise found
        return found


def _source_or_problem(url: str) -> Fingerprint | PipelineError:
    try:
        return source_fingerprint(url)
    except PipelineError as problem:
        return problem
