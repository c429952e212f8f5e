"""Where a result comes from, as far as its source's own files tell: name, license, languages.

Nothing here is invented: what the source does not say stays unsaid. What it does say is read
defensively, since anyone may have written it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.logging import url_name
from pipeline.errors import PipelineError, StorageError
from pipeline.model.preset import is_legal
from pipeline.recipe.yaml_document import read_yaml
from pipeline.storage.backend import Patience
from pipeline.storage.object_store import open_store

CARD_FILE = "README.md"
_DEADLINE_SECONDS = 15.0
_MAX_BYTES = 4 << 20

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""A repository of the Hugging Face hub: its owner and its name."""
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# How huggingface_hub names the folders of its cache.
_IN_CACHE = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]{40}/?$")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9-]{1,15}")
_DATA_SET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_TAG = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_LINK = re.compile(r"https://[\w.~/%-]{1,500}", re.ASCII)
# Texts that name themselves in their first lines.
_TEXTS = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0, January 2004\s"),
    "mit": re.compile(r"\s*(?:The )?MIT License\b(?=.*Permission is hereby granted, free)", re.S),
}
_MOST_VALUES = 200


@dataclass(frozen=True, kw_only=True)
class License:
    """What the source says of its license.

    Attributes:
        id: as the hub calls it, such as "apache-2.0"; "other" for a text that is none of those
            that this version recognizes; "" if nothing is said.
        name, link: of a license that has no id of its own.
        said_by: the file that says so.
    """

    id: str = ""
    name: str = ""
    link: str = ""
    said_by: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A result's source.

    Attributes:
        name: of its folder, or of its repository; never a whole path.
        repository: on the hub; "" if unknown.
        legal_files: names of its licenses and notices.
        pipeline_tag: what its card says that it is for.
        notes: what could not be read, in words.
    """

    name: str
    repository: str = ""
    license: License = dataclasses.field(default_factory=License)
    legal_files: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    pipeline_tag: str = ""
    notes: tuple[str, ...] = ()


def find_origin(source_url: str, carried: Mapping[str, bytes]) -> Origin:
    """Read what a source says of itself.

    Args:
        source_url: the folder that was quantized; it may be gone.
        carried: the files of the source that came along into the result, by name.
    """
    found = dict(carried)
    notes = []
    try:
        found |= _small_files(source_url)
    except PipelineError:
        notes.append(
            "the source could not be read, so only the files that came along into the result tell "
            "of its license"
        )
    metadata: dict[str, Any] = {}
    if CARD_FILE in found:
        try:
            metadata = front_matter(found[CARD_FILE])
        except PipelineError as error:
            notes.append(f"the source's {CARD_FILE} was left out: {error}")
    legal = tuple(sorted(filter(is_legal, found)))
    in_cache = _IN_CACHE.search(source_url)
    repository = "" if in_cache is None else f"{in_cache['owner']}/{in_cache['name']}"
    if not REPOSITORY.fullmatch(repository):
        repository = ""
    return Origin(
        name=repository or url_name(source_url),
        repository=repository,
        license=_stated_license(metadata) or _license_of_texts(found, legal) or License(),
        legal_files=legal,
        languages=_languages(metadata.get("language")),
        datasets=_texts(metadata.get("datasets"), _DATA_SET),
        pipeline_tag=next(iter(_texts(metadata.get("pipeline_tag"), _TAG)), ""),
        notes=tuple(notes),
    )


def front_matter(card: bytes) -> dict[str, Any]:
    """The YAML at the head of a model card; empty if there is none.

    Raises:
        PipelineError: not UTF-8, or YAML that cannot be read or is not safe to read.
    """
    try:
        text = card.decode()
    except UnicodeDecodeError:
        raise PipelineError("it is not UTF-8 text") from None
    found = _FRONT_MATTER.match(text)
    if found is None or not found[1].strip():
        return {}
    values = read_yaml(found[1], where=CARD_FILE, error_type=PipelineError).values
    return values if isinstance(values, dict) else {}


def _small_files(source_url: str) -> dict[str, bytes]:
    """A folder's card and licenses; it answers soon, or not at all."""
    patience = Patience.configured()
    soon = min(_DEADLINE_SECONDS, patience.deadline_seconds)
    store = open_store(source_url, dataclasses.replace(patience, deadline_seconds=soon))
    sizes = {key: version.size_bytes for key, version in store.versions().items()}
    if not sizes:
        raise StorageError(f"{source_url}: nothing is there")
    names = [n for n in sizes if "/" not in n and (n == CARD_FILE or is_legal(n))]
    return {name: store.get(name) for name in names if sizes[name] <= _MAX_BYTES}


def _stated_license(metadata: Mapping[str, Any]) -> License | None:
    """The license that a card's front matter names."""
    ids = _texts(metadata.get("license"), LICENSE_ID)
    if len(ids) != 1:  # of several, none is that of the whole model
        return None
    name = metadata.get("license_name")
    link = metadata.get("license_link")
    return License(
        id=ids[0],
        name=name if isinstance(name, str) and LICENSE_ID.fullmatch(name) else "",
        link=link if isinstance(link, str) and _LINK.fullmatch(link) else "",
        said_by=CARD_FILE,
    )


def _license_of_texts(found: Mapping[str, bytes], legal: Iterable[str]) -> License | None:
    """The license whose text lies beside the model."""
    named = [name for name in legal if re.match(r"LICEN[SC]E|.*LICENSE$", name)]
    if not named:
        return None
    # The plainest name is the license of the whole.
    name = min(named, key=lambda one: (len(one), one))
    text = found[name].decode("utf-8", "replace")
    known = next((one for one, pattern in _TEXTS.items() if pattern.match(text)), "other")
    return License(id=known, said_by=name)


def _languages(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    # YAML reads the code of the Norwegian language as false.
    return _texts(["no" if one is False else one for one in values], _LANGUAGE)


def _texts(value: object, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The texts in a value that may be one or a list, without those that do not look right."""
    values = value if isinstance(value, list) else [value]
    good = (o for o in values[:_MOST_VALUES] if isinstance(o, str) and pattern.fullmatch(o))
    return tuple(dict.fromkeys(good))
