"""One model × one recipe, resolved: all that a process needs to make and judge the result."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jobs.catalog.entries import Gate
from pipeline.canonical import digest_of
from pipeline.errors import MissingObjectError, PipelineError
from pipeline.executor.protocol import ComputeSpec
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import StoredRecord

REQUESTS_PREFIX = "requests/"
RUNS_PREFIX = "runs/"

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,199}")


@dataclass(frozen=True, kw_only=True)
class Request(StoredRecord):
    """A result that is asked for, with the fingerprints of everything that it is made from.

    Attributes:
        model, recipe_name: the names under which the result is published.
        aliases: other models' names under which it is published too.
        recipe: as `Recipe.to_dict` returns it.
        evaluation_texts, evaluation_windows: what the result is evaluated on; it is not evaluated
            without texts.
        needs: what its run takes of a cluster.
        keep: how many of the newest releases keep their artifacts.
        source, texts, evaluation: fingerprints, by file, of the source, the calibration texts and
            the evaluation texts.
        versions: of the packages that compute the result.
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
    source: dict[str, str]
    texts: dict[str, str]
    evaluation: dict[str, str]
    versions: dict[str, str]

    @cached_property
    def run_id(self) -> str:
        """Id of the run that makes the result; it depends only on what decides the bytes."""
        decisive = {
            "model": self.model,
            "recipe": self.recipe,
            "source": self.source,
            "texts": self.texts,
            "versions": self.versions,
            "threads": self.needs.threads,
            "device": self.needs.device,
        }
        return f"{self._name}-{digest_of(decisive)[:12]}"

    @cached_property
    def request_id(self) -> str:
        """Id of the whole request; two requests for the same run may differ in how it is judged."""
        return f"{self._name}-{digest_of(self.content())[:12]}"

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


def checked_id(given: str) -> str:
    """Return a request's or a run's id, which becomes part of keys, if it is valid.

    Raises:
        PipelineError: it is not.
    """
    if not _ID.fullmatch(given) or ".." in given:
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
