"""A store behind a network: S3 and what speaks like it, through fsspec.

Settings differ from s3fs' own where those can lose or invent bytes: no listing cache (reads came
back truncated), no multipart writes (completing one may ignore that the object exists, and a lost
acknowledgement leaves it open), no file handles for writing (closing one after an error publishes
half an object), and one loop that tries again instead of three nested ones.
"""

from __future__ import annotations

import datetime
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline.canonical import digest_of
from pipeline.errors import StorageError
from pipeline.storage.backend import Patience, Version
from pipeline.storage.remote_errors import FAILURES, judge

_T = TypeVar("_T")

_S3 = ("s3", "s3a")
# Those whose pipe_file(mode="create") is one conditional request. fsspec's own default looks
# first and writes then, so that two writers can both succeed.
_CREATE_ONCE = (*_S3, "gs", "gcs", "abfs", "abfss", "az")
# The limit of one PUT. A larger write would need several, and so another way to be atomic.
_LARGEST_BYTES = 5 * 2**30 - 1
# Above this, several connections are faster than one.
_SINGLE_READ_BYTES = 64 * 2**20
# A transfer slower than this is taken to hang.
_SLOWEST_BYTES_PER_SECOND = 2**20
_FIRST_PAUSE_SECONDS = 0.1


class RemoteBackend:
    """Objects of an fsspec filesystem below a URL; credentials and endpoint from the environment.

    Of other protocols than those in `_CREATE_ONCE` it only reads.
    """

    def __init__(self, root_url: str, patience: Patience) -> None:
        self._root_url = root_url
        self._patience = patience
        self._protocol, _, place = root_url.partition("://")
        self._opened: tuple[int, Any] | None = None
        if not place:
            raise StorageError(f"{root_url}:// names no bucket; write {root_url}://bucket/place")
        try:
            kind = fsspec.get_filesystem_class(self._protocol)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"{root_url}: no filesystem for {self._protocol}:// is installed; use a path or "
                "s3://, or install the fsspec package of that protocol"
            ) from error
        self._root: str = kind._strip_protocol(root_url)

    def read(self, key: str, num_bytes: int | None) -> bytes:
        options: dict[str, Any] = {}
        if self._protocol in _S3:
            # Reading in parts asks for the size first, and fills what does not arrive with zeros:
            # only where the caller knows the size, and gains by it.
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

    def size(self, key: str) -> int:
        info = self._try(key, lambda fs, path: fs.info(path, **self._limit(fs, 0)))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return int(info["size"])

    def write(self, key: str, data: bytes) -> None:
        self._pipe(key, data, "overwrite")

    def create(self, key: str, data: bytes) -> None:
        self._pipe(key, data, "create")

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        if self._protocol not in _S3:
            raise StorageError(
                f"{self._root_url}: {self._protocol}:// is not known to replace an object only if "
                "it is unchanged, which moving a pointer needs; use a path or s3://"
            )
        # The tag first: should the object change before it is read, the write below fails.
        info = self._try(key, lambda fs, path: fs.info(path, **self._limit(fs, 0)))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        if self.read(key, None) != expected:
            raise FileExistsError(f"{self._root_url}/{key}")
        # Unquoted: servers that compare strings take quotes for a part of it.
        self._pipe(key, data, "overwrite", {"IfMatch": info["ETag"].strip('"')})

    def version(self, key: str) -> Version:
        info = self._try(key, lambda fs, path: fs.info(path, **self._limit(fs, 0)))
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return _version(info)

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        directory = prefix.rpartition("/")[0]
        try:
            found = self._try(directory, lambda fs, path: fs.find(path, detail=True))
        except FileNotFoundError:
            return
        for name, info in found.items():
            key = name.removeprefix(f"{self._root}/")
            if key.startswith(prefix) and info["type"] == "file":
                yield key, _version(info)

    def list(self, prefix: str) -> Iterator[str]:
        directory = prefix.rpartition("/")[0]
        try:
            names = self._try(directory, lambda fs, path: fs.find(path))
        except FileNotFoundError:
            return
        for name in names:
            key = name.removeprefix(f"{self._root}/")
            if key.startswith(prefix):
                yield key

    def delete(self, key: str) -> None:
        try:
            self._try(key, lambda fs, path: fs.rm_file(path, **self._limit(fs, 0)))
        except FileNotFoundError:
            return

    def leftovers(self) -> Iterator[str]:
        # One request writes a whole object, so that none is ever left half-written.
        return iter(())

    def sweep(self, leftover: str) -> None:
        raise AssertionError(f"{leftover}: nothing is ever left over")

    def _pipe(
        self, key: str, data: bytes, mode: str, conditions: Mapping[str, str] | None = None
    ) -> None:
        if self._protocol not in _CREATE_ONCE:
            raise StorageError(
                f"{self._root_url}: {self._protocol}:// cannot create an object only once, so "
                "nothing is written there; use a path or s3://"
            )
        if len(data) > _LARGEST_BYTES:
            raise StorageError(
                f"{self._root_url}/{key} would have {len(data)} bytes, but one write takes at most "
                f"{_LARGEST_BYTES}; quantize this layer to fewer bits, or use a path"
            )
        # s3fs sends twice its chunk size at once; beyond, in parts.
        options: dict[str, Any] = {"chunksize": _LARGEST_BYTES} if self._protocol in _S3 else {}
        options |= conditions or {}
        self._try(
            key,
            lambda fs, path: fs.pipe_file(
                path, data, mode=mode, **options, **self._limit(fs, len(data))
            ),
        )

    def _try(self, key: str, operation: Callable[[Any, str], _T]) -> _T:
        """Run an operation until it succeeds, cannot mend, or the deadline passes."""
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
                verdict = judge(error)
                if verdict.is_missing:
                    raise FileNotFoundError(url) from error
                if verdict.is_conflict:
                    raise FileExistsError(url) from error
                if verdict.is_past_end:
                    raise EOFError(url) from error
                if not verdict.may_mend:
                    raise StorageError(f"{url}: {verdict.text}") from error
                elapsed = time.monotonic() - start
                if elapsed >= self._patience.deadline_seconds:
                    raise StorageError(
                        f"{url}: {verdict.text}, {num_tries} times in {elapsed:.0f} seconds; check "
                        "that the store is up and AWS_ENDPOINT_URL right, then start again"
                    ) from error
            # Jitter, so that a fleet that was throttled together does not return together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._patience.longest_pause_seconds)

    def _limit(self, fs: Any, num_bytes: int | None) -> dict[str, float]:
        """How long one try may take: sockets watch over answers, but over no stalled upload."""
        if num_bytes is None or not isinstance(fs, AsyncFileSystem):
            return {}
        transfer_seconds = num_bytes / _SLOWEST_BYTES_PER_SECOND
        # Twice, since looking at an object may take two requests.
        silence_seconds = 2 * (self._patience.connect_seconds + self._patience.read_seconds)
        return {"timeout": silence_seconds + transfer_seconds}

    def _filesystem(self) -> Any:
        # Its event loop and sockets do not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _shared(self._protocol, self._patience))
        return self._opened[1]


# Making a client takes half a second, and a fleet opens thousands of stores.
_opened: dict[tuple[int, str, Patience, str], Any] = {}
_opening = threading.Lock()


def _shared(protocol: str, patience: Patience) -> Any:
    """The filesystem of all stores of this process that are reached in the same way."""
    environment = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # Only a digest: secrets are among them.
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
        # Ours is the only loop: tries multiply, and so do their pauses.
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        # Other servers than Amazon's seldom have a host name for every bucket.
        config["s3"] = {"addressing_style": "path"}
    fs = fsspec.filesystem(protocol, config_kwargs=config, **options)
    fs.retries = 1  # of s3fs, around those of botocore
    # Once, now: threads that come together would each make a client.
    fs.connect()
    return fs


def _version(info: Mapping[str, Any]) -> Version:
    size_bytes = int(info["size"])
    # Without an entity tag, as of http://, the size and the date are all there is.
    modified = info.get("LastModified") or info.get("last_modified") or info.get("mtime")
    tag = str(info.get("ETag") or info.get("etag") or modified or "").strip('"')
    seconds = modified.timestamp() if isinstance(modified, datetime.datetime) else 0.0
    return Version(token=f"{tag}-{size_bytes}", size_bytes=size_bytes, modified=seconds)
