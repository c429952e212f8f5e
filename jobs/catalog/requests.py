"""From a catalog to requests: what is asked for, as the files that it names are now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.catalog.catalog_file import Catalog, Entry
from jobs.catalog.fingerprints import Known, package_versions, source_state, texts_state
from jobs.catalog.request import Gate, Needs, Request
from pipeline.errors import PipelineError
from pipeline.recipe.recipe import Recipe

_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One run that a catalog wants.

    Attributes:
        entry: the catalog's model.
        recipe: one of its recipes.
        request: None where its files cannot be looked at.
        problem: why not.
        bytes_read: in finding out, for the first of a model's recipes.
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


def wanted_runs(catalog: Catalog) -> Iterator[Wanted]:
    """Look at each model's files, and yield what is wanted of it, in the catalog's order.

    A model that cannot be looked at does not keep the others from being made. Each source is
    listed once, and each text, however many entries name it.
    """
    looks = _Looks()
    looks.ahead(dict.fromkeys(entry.preset for entry in catalog.entries))
    versions = dict(package_versions())
    for entry in catalog.entries:
        first = True
        for recipe in entry.recipes:
            try:
                source, is_new = looks.source(entry.preset)
                request = _request(entry, recipe, source, versions, looks)
            except PipelineError as problem:
                yield Wanted(entry=entry, recipe=recipe, problem=problem)
                continue
            cost = source.bytes_read if first and is_new else 0
            yield Wanted(entry=entry, recipe=recipe, request=request, bytes_read=cost)
            first = False


def _request(
    entry: Entry, recipe: Recipe, source: Known, versions: dict[str, str], looks: _Looks
) -> Request:
    settings, values = entry.settings, recipe.to_dict()
    calibration = values["calibration"]
    judged_by = settings.evaluate_on or ()
    limits = settings.gate
    needs = settings.resources
    return Request(
        model=entry.name,
        recipe_name=recipe.name,
        aliases=entry.aliases,
        source_url=entry.preset,
        recipe=values,
        evaluation_texts=judged_by,
        evaluation_windows=settings.windows,
        gate=None if limits is None else Gate(**limits.model_dump()),
        needs=Needs(
            workers=needs.workers,
            threads=needs.threads,
            device=needs.device,
            memory_bytes=None if needs.memory is None else int(needs.memory),
        ),
        keep=settings.retention.keep,
        source=dict(source.state),
        texts={} if calibration is None else dict(looks.texts(tuple(calibration["texts"])).state),
        evaluation=dict(looks.texts(judged_by).state),
        versions=versions,
    )


def _look(url: str) -> Known | PipelineError:
    try:
        return source_state(url)
    except PipelineError as problem:
        return problem


class _Looks:
    """What was looked at in this pass."""

    def __init__(self) -> None:
        self._sources: dict[str, Known | PipelineError] = {}
        self._told: set[str] = set()
        self._texts: dict[tuple[str, ...], Known | PipelineError] = {}

    def ahead(self, urls: Iterable[str]) -> None:
        """Look at many sources at once: each is waited for, not worked for."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._sources.update(zip(urls, pool.map(_look, urls), strict=True))

    def source(self, url: str) -> tuple[Known, bool]:
        """What is known of a source, and whether nobody asked before."""
        is_new = url not in self._told
        self._told.add(url)
        found = self._sources[url]
        if isinstance(found, PipelineError):
            raise found
        return found, is_new

    def texts(self, sources: tuple[str, ...]) -> Known:
        if sources not in self._texts:
            try:
                self._texts[sources] = texts_state(sources)
            except PipelineError as problem:
                self._texts[sources] = problem
        found = self._texts[sources]
        if isinstance(found, PipelineError):
            raise found
        return found
