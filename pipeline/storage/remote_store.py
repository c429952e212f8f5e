"""A store behind a network: S3 and compatible servers, through fsspec.

s3fs's defaults can lose or invent bytes. So: no listing cache (reads came back truncated), no
multipart writes (completing one may ignore that the object exists), no file handles for writing
(closing one after an error publishes a partial object), one retry loop instead of three.
"""

from __future__ import annotations

import datetime
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter, signature
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline.canonical import digest_of
from pipeline.errors import StorageError, StorageUrlError
from pipeline.storage.backend import Backend, Patience, Version
from pipeline.storage.paged_folders import Page, folders_by_pages
from pipeline.storage.remote_errors import FAILURES, classify

_T = TypeVar("_T")

_S3 = ("s3", "s3a")
# Protocols whose pipe_file(mode="create") is one conditional request. fsspec's default checks first
# and then writes, so that two writers can both succeed.
_CREATE_ONCE = (*_S3, "gs", "gcs", "abfs", "abfss", "az")
# The limit of one PUT. A larger object would need several requests, which are not atomic.
_LARGEST_BYTES = 5 * 2**30 - 1
# Above this, several connections are faster than one.
_SINGLE_READ_BYTES = 64 * 2**20
# A slower transfer is considered hung.
_SLOWEST_BYTES_PER_SECOND = 2**20
_FIRST_PAUSE_SECONDS = 0.1
_PAGE_BYTES = 2**20
"""Of a listing, about: a thousand keys of the longest kind."""
_AS_RAISED_BY_PYTHON: Mapping[str, type[Exception]] = {
    "missing": FileNotFoundError,
    "conflict": FileExistsError,
    "past end": EOFError,
}


class RemoteBackend(Backend):
    """Objects of an fsspec filesystem below a URL; credentials and endpoint from the environment.

    Read-only for protocols that are not in `_CREATE_ONCE`.
    """

    def __init__(self, root_url: str, patience: Patience) -> None:
        self._root_url = root_url
        self._patience = patience
        self._protocol, _, path = root_url.partition("://")
        self._opened: tuple[int, Any] | None = None
        if not path:
            raise StorageUrlError(f"{root_url}:// names no bucket; write {root_url}://bucket/path")
        try:
            filesystem_class = fsspec.get_filesystem_class(self._protocol)
        except (ImportError, ValueError) as error:
            raise StorageUrlError(
                f"{root_url}: no filesystem for {self._protocol}:// is installed; use a path or "
                "s3://, or install the fsspec package of that protocol"
            ) from error
        if wanted := _wanted_settings(filesystem_class):
            raise StorageUrlError(
                f"{root_url}: {self._protocol}:// cannot be opened, since its filesystem wants "
                f"settings ({', '.join(wanted)}); use a path or s3://"
            )
        self.is_writable = self._protocol in _CREATE_ONCE
        self._root: str = filesystem_class._strip_protocol(root_url)

    def read(self, key: str, num_bytes: int | None) -> bytes:
        options: dict[str, Any] = {}
        if self._protocol in _S3:
            # s3fs pads a parallel read with zeros where bytes are missing, and needs the size
            # first: use it only if the caller knows the size and the object is large.
            parallel = num_bytes is not None and num_bytes > _SINGLE_READ_BYTES
            options["max_concurrency"] = 8 if parallel else 1
        return self._try(
            key, lambda fs, path: bytes(fs.cat_file(path, **options, **self._limit(fs, num_bytes)))
        )

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if start == stop:  # HTTP has no empty range
            return b""

        def read(fs: Any, path: str) -> bytes:
            return bytes(fs.cat_file(path, start=start, end=stop, **self._limit(fs, stop - start)))

        try:
            return self._try(key, read)
        except EOFError:
            return b""

    def write(self, key: str, data: bytes) -> None:
        self._pipe(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> None:
        self._pipe(key, data, "create")

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        if self._protocol not in _S3:
            raise StorageUrlError(
                f"{self._root_url}: {self._protocol}:// has no compare-and-set, which updating a "
                "pointer needs; use a path or s3://"
            )
        # The tag first: if the object changes before it is read, the write below fails.
        info = self._info(key)
        if self.read(key, None) != expected:
            raise FileExistsError(f"{self._root_url}/{key}")
        # Unquoted: some servers compare it as a string, quotes included.
        self._pipe(key, data, "overwrite", {"IfMatch": info["ETag"].strip('"')})

    def version(self, key: str) -> Version:
        return _version(self._info(key))

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        if self._protocol in _S3:
            yield from self._pages(prefix)
            return
        for key, info in self._find(prefix):
            if info["type"] == "file":
                yield key, _version(info)

    def list(self, prefix: str) -> Iterator[str]:
        if self._protocol in _S3:
            return (key for key, _ in self._pages(prefix))
        # Not through `versions`: over http:// a listing gives no sizes.
        return (key for key, _ in self._find(prefix))

    def folders(self, prefixes: Sequence[str]) -> Iterator[tuple[str, dict[str, Version]]]:
        if self._protocol in _S3:
            yield from folders_by_pages(self._page, self._pages, prefixes)
        else:
            yield from super().folders(prefixes)

    def _pages(self, prefix: str) -> Iterator[tuple[str, Version]]:
        page = self._page(prefix)
        yield from page.entries
        while page.token:
            page = self._page(prefix, token=page.token)
            yield from page.entries

    def _page(self, prefix: str, after: str = "", *, token: str = "") -> Page:
        """A page of keys with a prefix: the first after a key, or the one that a token names."""

        def ask(fs: Any, _: str) -> tuple[str, Any]:
            # Not at the first slash: the name of an access point has one.
            bucket, below, _ = fs.split_path(self._root)
            root = f"{below}/" if below else ""
            place = {"ContinuationToken": token} if token else {}
            place |= {"StartAfter": f"{root}{after}"} if after else {}
            return root, fs.call_s3(
                "list_objects_v2",
                Bucket=bucket,
                Prefix=f"{root}{prefix}",
                **place,
                **self._limit(fs, _PAGE_BYTES),
            )

        try:
            root, answer = self._try(prefix, ask)
        except FileNotFoundError:  # no such bucket
            return Page(entries=())
        entries = tuple(
            (one["Key"].removeprefix(root), _listed_version(one))
            for one in answer.get("Contents", ())
        )
        return Page(entries=entries, token=answer.get("NextContinuationToken", ""))

    def _find(self, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        directory = prefix.rpartition("/")[0]
        try:
            found = self._try(directory, lambda fs, path: fs.find(path, detail=True))
        except FileNotFoundError:
            return
        for name, info in found.items():
            key = name.removeprefix(f"{self._root}/")
            if key.startswith(prefix):
                yield key, info

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._try(key, lambda fs, path: fs.rm_file(path, **self._limit(fs, 0)))

    def _info(self, key: str) -> Mapping[str, Any]:
        info: Any = self._try(key, lambda fs, path: fs.info(path, **self._limit(fs, 0)))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return dict(info)

    def _pipe(
        self, key: str, data: bytes, mode: str, conditions: Mapping[str, str] | None = None
    ) -> None:
        if not self.is_writable:
            raise StorageUrlError(
                f"{self._root_url}: {self._protocol}:// has no create-once writes, so it is "
                "read-only; use a path or s3://"
            )
        if len(data) > _LARGEST_BYTES:
            raise StorageError(
                f"{self._root_url}/{key} would have {len(data)} bytes, but one write is limited to "
                f"{_LARGEST_BYTES}; quantize this layer to fewer bits, or use a path"
            )
        # s3fs uses multipart above twice its chunk size.
        options: dict[str, Any] = {"chunksize": _LARGEST_BYTES} if self._protocol in _S3 else {}
        options |= conditions or {}
        self._try(
            key,
            lambda fs, path: fs.pipe_file(
                path, data, mode=mode, **options, **self._limit(fs, len(data))
            ),
        )

    def _try(self, key: str, operation: Callable[[Any, str], _T]) -> _T:
        """Retry an operation until it succeeds, fails for good, or the deadline passes."""
        path = f"{self._root}/{key}".rstrip("/")
        url = f"{self._root_url}/{key}".rstrip("/")
        start = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        num_tries = 0
        while True:
            num_tries += 1
            try:
                return operation(self._filesystem(), path)
            except FAILURES as error:
                failure = classify(error)
                if failure.meaning in _AS_RAISED_BY_PYTHON:
                    raise _AS_RAISED_BY_PYTHON[failure.meaning](url) from error
                if failure.meaning == "permanent":
                    raise StorageError(f"{url}: {failure.text}") from error
                elapsed = time.monotonic() - start
                if elapsed >= self._patience.deadline_seconds:
                    raise StorageError(
                        f"{url}: {failure.text}, {num_tries} times in {elapsed:.0f} seconds; check "
                        "that the store is up and AWS_ENDPOINT_URL is right, then start again"
                    ) from error
            # Jitter, so that workers throttled together do not all return at once.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._patience.longest_pause_seconds)

    def _limit(self, fs: Any, num_bytes: int | None) -> dict[str, float]:
        """The time limit of one attempt: socket timeouts do not cover a stalled upload."""
        if num_bytes is None or not isinstance(fs, AsyncFileSystem):
            return {}
        transfer_seconds = num_bytes / _SLOWEST_BYTES_PER_SECOND
        # Twice, since `info` may take two requests.
        silence_seconds = 2 * (self._patience.connect_seconds + self._patience.read_seconds)
        return {"timeout": silence_seconds + transfer_seconds}

    def _filesystem(self) -> Any:
        # The event loop and sockets do not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _shared(self._protocol, self._patience))
        return self._opened[1]


@functools.cache
def _wanted_settings(filesystem_class: type[Any]) -> tuple[str, ...]:
    """What a filesystem cannot be opened without, such as ftp's host: we pass nothing of a URL."""
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    _, *parameters = signature(filesystem_class.__init__).parameters.values()
    wanted = (one for one in parameters if one.default is Parameter.empty)
    return tuple(one.name for one in wanted if one.kind in named)


# Creating a client takes half a second, and a fleet opens thousands of stores.
_opened: dict[tuple[int, str, Patience, str], Any] = {}
_opening = threading.Lock()


def _shared(protocol: str, patience: Patience) -> Any:
    """The filesystem shared by all stores of this process with the same settings."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # A digest, since the environment holds secrets.
    key = (os.getpid(), protocol, patience, digest_of(environment))
    with _opening:
        if key not in _opened:
            _opened[key] = _open(protocol, patience)
        return _opened[key]


def _open(protocol: str, patience: Patience) -> Any:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol not in _S3:
        return fsspec.filesystem(protocol, **options)
    config: dict[str, Any] = {
        "connect_timeout": patience.connect_seconds,
        "read_timeout": patience.read_seconds,
        # `_try` is the only retry loop: nested ones multiply attempts and pauses.
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        # botocore would put its own together anew for each request, twice. Without a version, which
        # a worker that has the code from elsewhere could not look up.
        "user_agent": "quantfleet",
    }
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        # Servers other than Amazon's seldom have a host name per bucket.
        config["s3"] = {"addressing_style": "path"}
    fs = fsspec.filesystem(protocol, config_kwargs=config, session=_session(), **options)
    fs.retries = 1  # s3fs's own loop, around botocore's
    # Connect now: otherwise threads that start together would create a client each.
    fs.connect()
    return fs


def _session() -> Any:
    """A session that reads listings quickly."""
    from aiobotocore.session import AioSession

    from pipeline.storage.s3_listing import parse_time, take_objects

    session: Any = AioSession()
    factory = session.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=parse_time)
    # Before botocore's own, of which one parses the whole page to see whether it is an error.
    emitter = session.get_component("event_emitter")
    emitter.register_first("before-parse.s3.ListObjectsV2", take_objects)
    return session


def _listed_version(one: Mapping[str, Any]) -> Version:
    """Of a listing's line, of which a request has a thousand: the same as `_version`."""
    size_bytes: int = one["Size"]
    if not ("ETag" in one and "LastModified" in one):
        return _version({**one, "size": size_bytes})
    tag = one["ETag"].strip('"')
    modified: float = one["LastModified"].timestamp()
    return Version(token=f"{tag}-{size_bytes}", size_bytes=size_bytes, modified=modified)


def _version(info: Mapping[str, Any]) -> Version:
    size_bytes = int(info["size"])
    # Without an entity tag, as over http://, only size and date are known.
    modified = info.get("LastModified") or info.get("last_modified") or info.get("mtime")
    tag = str(info.get("ETag") or info.get("etag") or modified or "").strip('"')
    seconds = modified.timestamp() if isinstance(modified, datetime.datetime) else 0.0
    return Version(token=f"{tag}-{size_bytes}", size_bytes=size_bytes, modified=seconds)
