"""Fingerprints of models' files, found by listing them: many models' in few requests."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future

from pipeline.canonical import sha256
from pipeline.errors import PipelineError, SourceError
from pipeline.model.preset import decides_model
from pipeline.storage.backend import Version
from pipeline.storage.object_store import open_store

Fingerprint = tuple[dict[str, str], int]
"""A token for each file, and how many bytes of content were read."""

_MAX_JSON_BYTES = 256 << 10
_FOLDERS_TOGETHER = 64
"""Of one parent, listed by one thread."""
# As names that are keys of a store, without folders.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class SourceFingerprints:
    """Those of several sources, each found once."""

    def __init__(self) -> None:
        self._found: dict[str, Future[Fingerprint]] = {}

    def find(self, urls: Iterable[str], pool: Executor) -> None:
        """Fingerprint the sources that are not known yet; folders side by side are listed together.

        Args:
            pool: does it; no problem is raised before a source is asked for.
        """
        new = [url for url in dict.fromkeys(urls) if url not in self._found]
        for url in new:
            self._found[url] = Future()
        for group in _side_by_side(new):
            pool.submit(self._fingerprint, group)

    def of(self, url: str) -> Fingerprint:
        """A source's.

        Raises:
            PipelineError: as `source_fingerprint`.
        """
        return self._found[url].result()

    def forget(self, urls: Iterable[str]) -> None:
        """Keep them no longer."""
        for url in urls:
            del self._found[url]

    def _fingerprint(self, urls: Sequence[str]) -> None:
        waiting = {url: self._found[url] for url in urls}
        try:
            for url, versions in _listed(urls):
                future = waiting.pop(url)
                try:
                    future.set_result(source_fingerprint(url, versions))
                except PipelineError as problem:
                    future.set_exception(problem)
        except BaseException as problem:  # noqa: BLE001 - raised again where it is asked for
            for future in waiting.values():
                future.set_exception(problem)


def _side_by_side(urls: Iterable[str]) -> Iterator[Sequence[str]]:
    """Sources of one remote folder together, some at a time; all others alone."""
    by_parent: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        parent, _, name = url.rpartition("/")
        is_remote = "://" in parent and not parent.startswith("file://")
        if is_remote and not parent.endswith(":/") and _NAME.fullmatch(name):
            by_parent[parent].append(url)
        else:
            yield [url]
    for together in by_parent.values():
        ordered = sorted(together)
        for start in range(0, len(ordered), _FOLDERS_TOGETHER):
            yield ordered[start : start + _FOLDERS_TOGETHER]


def _listed(urls: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Version]]]:
    """The files of each source of a group.

    Raises:
        StorageError: the store cannot be used.
    """
    if len(urls) == 1:
        yield urls[0], open_store(urls[0]).versions()
        return
    parent = urls[0].rpartition("/")[0]
    names = {f"{url.rpartition('/')[2]}/": url for url in urls}
    for prefix, versions in open_store(parent).folders(names):
        yield names[prefix], versions


def source_fingerprint(url: str, versions: Mapping[str, Version] | None = None) -> Fingerprint:
    """Fingerprint the files of a preset that decide what the model is.

    A token is the size and version that the store reports. On a disk, where a version is only a
    timestamp, small JSON files are hashed instead.

    Args:
        versions: of its files, if they are listed already.

    Raises:
        SourceError: no preset is there.
        StorageError: the store cannot be used.
    """
    store = open_store(url)
    is_on_disk = store.root_url.startswith("file://")
    tokens, bytes_read = {}, 0
    for name, version in (store.versions() if versions is None else versions).items():
        if not decides_model(name):
            continue
        name = sys.intern(name)
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
