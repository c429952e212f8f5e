"""One model × one recipe, resolved: all that a process needs to make and judge the result.

A request holds fingerprints of the files that it is made from. One that differs from an earlier one
means that something may have changed. An equal one proves nothing: a run's plan digests every byte
that is read.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from pydantic import ConfigDict

from jobs.catalog.entries import Gate
from pipeline.canonical import digest_of
from pipeline.composition.target import Target
from pipeline.errors import MissingObjectError, PipelineError
from pipeline.evaluation.named_texts import EvaluatedTexts
from pipeline.executor.protocol import ComputeSpec
from pipeline.export.settings import ExportSettings
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import STRICT, StoredRecord

REQUESTS_PREFIX = "requests/"
RUNS_PREFIX = "runs/"

EVALUATED_ON = ("evaluation_texts", "evaluation_sets", "evaluation_windows", "tasks")
"""The fields of a request that say what its result is evaluated on."""

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class ComposedOf:
    """What a composition is made of.

    Attributes:
        recipes: whose runs give blocks, each as `Recipe.to_dict` returns it.
        measure_texts, measure_windows: what blocks are measured on; without texts, the windows
            that the recipes calibrate on.
        by_layers: whether layers of one block may come from several runs.
        measured_on: fingerprints of these texts, by file.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    target: Target
    recipes: tuple[dict[str, Any], ...]
    measure_texts: tuple[str, ...]
    measure_windows: int
    by_layers: bool
    measured_on: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Request(StoredRecord):
    """A result that is asked for, with the fingerprints of everything that it is made from.

    Attributes:
        model, recipe_name: the names under which the result is published.
        aliases: other models' names under which it is published too.
        recipe: as `Recipe.to_dict` returns it; empty for a composition.
        evaluation_texts, evaluation_sets, evaluation_windows, tasks: what the result is evaluated
            on: texts without a name, named sets (omitted where there are none), windows of each,
            and questions; it is not evaluated without texts or tasks.
        needs: what its run takes of a cluster.
        keep: how many of the newest releases keep their artifacts.
        exports: what to export a result as that passes its gate; omitted where there are none.
        exports_like: fingerprints, by file, of the folders that exports take config and tokenizer
            from; omitted where there are none.
        source, texts, evaluation: fingerprints, by file, of the source, the calibration texts and
            what the result is evaluated on.
        versions: of the packages that compute the result.
        composed_of: of a composition; omitted for all others.
    """

    model: str
    recipe_name: str
    source_url: str
    recipe: dict[str, Any]
    aliases: tuple[str, ...] = ()
    evaluation_texts: tuple[str, ...] = ()
    evaluation_windows: int = 8
    gate: Gate | None = None
    needs: ComputeSpec = field(default_factory=ComputeSpec)
    keep: int = 3
    tasks: tuple[str, ...] = ()
    source: dict[str, str]
    texts: dict[str, str]
    evaluation: dict[str, str]
    versions: dict[str, str]
    exports: tuple[ExportSettings, ...] = ()
    exports_like: dict[str, str] = field(default_factory=dict)
    evaluation_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    composed_of: ComposedOf | None = None

    def content(self) -> dict[str, Any]:
        values = super().content()
        for name in ("tasks", "exports", "exports_like", "evaluation_sets", "composed_of"):
            if not values[name]:
                del values[name]  # older versions did not know it
        for name in ("accelerator", "gpus_per_worker", "one_gpu_each"):
            if not values["needs"][name]:
                del values["needs"][name]  # nor these
        return values

    @cached_property
    def run_id(self) -> str:
        """Id of the run that makes the result; it depends only on what decides the bytes."""
        decisive: dict[str, Any] = {
            "model": self.model,
            "recipe": self.recipe,
            "source": self.source,
            "texts": self.texts,
            "versions": self.versions,
            "threads": self.needs.threads,
            "device": self.needs.device,
        }
        if self.needs.accelerator is not None:
            decisive["accelerator"] = self.needs.accelerator
        if self.composed_of is not None:
            # Of what its size allows, that is kept which is found better.
            values = self.content()
            names = ("composed_of", *EVALUATED_ON, "evaluation")
            decisive |= {name: values[name] for name in names if name in values}
        return f"{self._name}-{digest_of(decisive)[:12]}"

    @cached_property
    def request_id(self) -> str:
        """Id of the whole request; two requests for the same run may differ in how it is judged."""
        return f"{self._name}-{digest_of(self.content())[:12]}"

    @cached_property
    def givers(self) -> tuple[Request, ...]:
        """The requests whose runs a composition takes blocks of; none for all others."""
        if self.composed_of is None:
            return ()
        return tuple(
            dataclasses.replace(
                self,
                recipe_name=recipe["name"],
                recipe=recipe,
                # Those that calibrate do so on the same texts.
                texts={} if recipe["calibration"] is None else self.texts,
                composed_of=None,
            )
            for recipe in self.composed_of.recipes
        )

    @property
    def evaluated_on(self) -> EvaluatedTexts:
        """The texts that the result is evaluated on."""
        return EvaluatedTexts(texts=self.evaluation_texts, sets=self.evaluation_sets)

    @property
    def names(self) -> tuple[str, ...]:
        """The models under whose names the result is published."""
        return (self.model, *self.aliases)

    @property
    def _name(self) -> str:
        return f"{self.model}-{self.recipe_name}"


def request_key(request_id: str) -> str:
    """Where a request lies, below a catalog's root."""
    return f"{REQUESTS_PREFIX}{checked_id(request_id)}.json"


def run_prefix(run_id: str) -> str:
    """Where a run lies, below a catalog's root."""
    return f"{RUNS_PREFIX}{checked_id(run_id)}/"


def run_store(root: ObjectStore, run_id: str) -> ObjectStore:
    """The store at a run's root."""
    return open_store(f"{root.root_url}/{run_prefix(run_id)}")


def is_id(given: str) -> bool:
    """Whether this may be the id of a request or a run."""
    return _ID.fullmatch(given) is not None and ".." not in given


def checked_id(given: str) -> str:
    """Return a request's or a run's id, which becomes part of keys, if it is valid.

    Raises:
        PipelineError: it is not.
    """
    if not is_id(given):
        raise PipelineError(
            f"{given[:200]!r} is not a run's or request's id: lower-case letters, digits and ._- "
            "only; use one that quantfleet status shows"
        )
    return given


def save_request(root: ObjectStore, request: Request) -> str:
    """Write a request once; returns its URL."""
    key = request_key(request.request_id)
    root.create(key, request.to_json())
    return root.url(key)


def load_request(url: str) -> tuple[ObjectStore, Request]:
    """Read a request; returns the root of its catalog too.

    Raises:
        PipelineError: there is no request at the URL.
    """
    root_url, separator, name = url.rpartition(f"/{REQUESTS_PREFIX}")
    if not separator or not name.endswith(".json"):
        raise PipelineError(
            f"{url} is not a request's URL, which ends in /{REQUESTS_PREFIX}NAME.json; quantfleet "
            "nightly and submit write requests"
        )
    root = open_store(root_url)
    key = request_key(name.removesuffix(".json"))
    try:
        request = Request.read(root, key)
    except MissingObjectError:
        raise PipelineError(
            f"no request is at {root.url(key)}; quantfleet nightly and submit write requests"
        ) from None
    if request_key(request.request_id) != key:
        raise PipelineError(f"{root.url(key)} holds another request, {request.request_id}")
    return root, request
