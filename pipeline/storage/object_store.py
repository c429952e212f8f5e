"""Object storage: bytes under keys below one URL, on a disk, in memory or on a server.

Storage is a run's only source of truth, so it is never trusted blindly: reads are checked against
recorded digests, and a writer learns whether another has created the object first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.canonical import sha256 as sha256_of
from pipeline.errors import DamagedObjectError, MissingObjectError, ObjectExistsError, StorageError
from pipeline.storage.backend import Backend, Patience, Version

# No segment begins with a dot: that excludes ".." and the backends' own hidden files.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*(?:[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_LONGEST_KEY = 512
# Reading again repairs a bit flip or a short body in transit, but not damage at rest.
_NUM_READS = 3
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ObjectStore:
    """Objects below `root_url`. Threads may share a store; other processes open the URL again.

    Keys are relative paths of letters, digits, `._-` and `/`; no segment begins with a dot. Every
    method raises StorageError for a bad key or a store that cannot be used.
    """

    root_url: str
    backend: Backend = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle the URL alone: a filesystem object would include its credentials.
        return open_store, (self.root_url,)

    @property
    def is_writable(self) -> bool:
        """Whether runs can be kept here, as far as the kind of store tells."""
        return self.backend.is_writable

    def url(self, key: str) -> str:
        """The object's full URL."""
        return f"{self.root_url}/{_checked(key)}"

    def get(
        self,
        key: str,
        *,
        sha256: str | None = None,
        size: int | None = None,
        at_most: int | None = None,
    ) -> bytes:
        """Read an object and check that it is the expected one.

        Args:
            sha256: its expected digest.
            size: its expected number of bytes.
            at_most: limit on its size; no more bytes are read.

        Raises:
            MissingObjectError: there is no object.
            DamagedObjectError: repeated reads gave other bytes, or too many.
        """
        for _ in range(_NUM_READS):
            with self._found(key):
                if at_most is None:
                    data = self.backend.read(key, size)
                else:
                    data = self.backend.read_range(key, 0, at_most + 1)
            if at_most is not None and len(data) > at_most:
                raise self._damaged(key, f"it has more than {at_most} bytes")
            if size is not None and len(data) != size:
                problem = f"it has {len(data)} bytes instead of {size}"
            elif sha256 is not None and sha256_of(data) != sha256:
                problem = f"its SHA-256 is {sha256_of(data)} instead of {sha256}"
            else:
                return data
        raise self._damaged(key, problem)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop), exactly `stop - start` of them.

        Raises:
            MissingObjectError: there is no object.
            DamagedObjectError: the object ends before `stop`.
        """
        if not 0 <= start <= stop:
            raise StorageError(f"{self.url(key)}: {start} to {stop} is not a range of bytes")
        for _ in range(_NUM_READS):
            with self._found(key):
                data = self.backend.read_range(key, start, stop)
            if len(data) == stop - start:
                return data
        raise self._damaged(key, f"{len(data)} bytes from {start} on instead of {stop - start}")

    def verify(self, key: str, *, sha256: str, size: int) -> None:
        """Read and hash an object in pieces of 64 MiB.

        Raises:
            MissingObjectError: there is no object.
            DamagedObjectError: its size or digest differs.
        """
        found = self.size(key)
        if found != size:
            raise self._damaged(key, f"it has {found} bytes instead of {size}")
        for _ in range(_NUM_READS):
            digest = hashlib.sha256()
            for start in range(0, size, _PIECE_BYTES):
                digest.update(self.get_range(key, start, min(start + _PIECE_BYTES, size)))
            if digest.hexdigest() == sha256:
                return
        raise self._damaged(key, f"its SHA-256 is {digest.hexdigest()} instead of {sha256}")

    def size(self, key: str) -> int:
        """An object's size in bytes.

        Raises:
            MissingObjectError: there is no object.
        """
        return self._version(key).size_bytes

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        with suppress(MissingObjectError):
            self._version(key)
            return True
        return False

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite an object atomically: readers see either the old bytes or the new."""
        self.backend.write(_checked(key), data)

    def create(self, key: str, data: bytes) -> None:
        """Write an object once: of several writers with different bytes exactly one succeeds.

        Finding the same bytes counts as success: after a lost acknowledgement they are our own.

        Raises:
            ObjectExistsError: the object holds other bytes.
        """
        try:
            self.backend.create(_checked(key), data)
        except FileExistsError as error:
            if self.get(key) != data:
                raise ObjectExistsError(
                    f"{self.url(key)} already exists with other bytes, and may be written only once"
                ) from error

    def replace(self, key: str, data: bytes, *, expected: bytes | None) -> None:
        """Compare and set: write an object if it still holds the bytes that the writer expects.

        As in `create`, finding the new bytes counts as success. Where that matters, include a
        counter or the writer's name in the bytes.

        Args:
            expected: the bytes that the object must hold now; None for no object.

        Raises:
            ObjectExistsError: the object holds other bytes.
            MissingObjectError: bytes were expected, but there is no object.
        """
        if expected is None:
            self.create(key, data)
            return
        try:
            with self._found(key):
                self.backend.replace(key, data, expected)
        except FileExistsError as error:
            if self.get(key) != data:
                raise ObjectExistsError(
                    f"{self.url(key)} was changed by another writer meanwhile; read it again"
                ) from error

    def version(self, key: str) -> str:
        """A token that changes when the object is written again, found without reading it.

        On disk it is made of size, times and inode, on S3 of size and entity tag.

        Raises:
            MissingObjectError: there is no object.
        """
        return self._version(key).token

    def versions(self, prefix: str = "") -> Mapping[str, Version]:
        """What is known about every object below a prefix, by key, without reading any.

        On S3 this takes one request per thousand objects. For prefixes see `list`.
        """
        if not _PREFIX.fullmatch(prefix):
            raise StorageError(f"{self.root_url}: {prefix!r} is not a prefix of a key")
        found = (pair for pair in self.backend.versions(prefix) if _KEY.fullmatch(pair[0]))
        return dict(sorted(found))

    def folders(self, prefixes: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Version]]]:
        """Yield what is known about the objects of each of several folders, empty ones too.

        On S3 a request answers for as many folders as have a thousand objects together: what lies
        between two that are asked for is jumped over. One folder is held at a time.

        Args:
            prefixes: each ends in "/"; none is within another.

        Yields:
            A prefix, and by key below it what is known, in the order of the prefixes' names.
        """
        asked = sorted(set(prefixes))
        for prefix in asked:
            if not (_PREFIX.fullmatch(prefix) and prefix.endswith("/")):
                raise StorageError(f"{self.root_url}: {prefix!r} is not the prefix of a folder")
        for prefix, found in self.backend.folders(asked):
            yield prefix, {key: found[key] for key in sorted(filter(_KEY.fullmatch, found))}

    def stream(self, prefix: str = "") -> Iterator[str]:
        """All keys that begin with a prefix, in any order, page by page; see `list`."""
        if not _PREFIX.fullmatch(prefix):
            raise StorageError(f"{self.root_url}: {prefix!r} is not a prefix of a key")
        return filter(_KEY.fullmatch, self.backend.list(prefix))

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """All keys that begin with `prefix`, such as "records/block-", sorted.

        Files whose names are not keys are omitted.
        """
        return tuple(sorted(self.stream(prefix)))

    def delete(self, key: str) -> None:
        """Remove an object; it need not exist."""
        self.backend.delete(_checked(key))

    def leftovers(self) -> tuple[str, ...]:
        """Partial files of writes that were interrupted, or are still in progress."""
        return tuple(sorted(self.backend.leftovers()))

    def sweep(self, leftover: str) -> None:
        """Remove one of `leftovers`."""
        if leftover not in self.leftovers():
            raise StorageError(f"{self.root_url}: {leftover!r} is not left over from a write")
        self.backend.delete(leftover)

    def _version(self, key: str) -> Version:
        with self._found(key):
            return self.backend.version(key)

    @contextmanager
    def _found(self, key: str) -> Iterator[None]:
        """Check the key, and raise MissingObjectError if the backend finds no such object."""
        try:
            _checked(key)
            yield
        except FileNotFoundError as error:
            raise MissingObjectError(f"{self.url(key)} does not exist") from error

    def _damaged(self, key: str, problem: str) -> DamagedObjectError:
        return DamagedObjectError(f"{self.url(key)} is damaged: {problem}")


def open_store(url: str, patience: Patience | None = None) -> ObjectStore:
    """Open the store at a path or URL. Nothing is contacted, and nothing need exist yet.

    Args:
        url: a local path, file://…, memory://… (this process only), s3://bucket/…, or a URL of
            another fsspec filesystem with create-once writes. Credentials and endpoint come from
            the environment.
        patience: how long to wait for a remote store; None takes it from the environment.

    Raises:
        StorageError: a URL that cannot be used.
    """
    # Imported when needed: s3fs alone takes half a second.
    from pipeline.storage.local_store import LocalBackend
    from pipeline.storage.memory_store import MemoryBackend

    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise StorageError("a storage URL is empty; give a path or a URL such as s3://bucket")
        scheme, rest = "file", str(Path(url).absolute())
    if "@" in rest.partition("/")[0] and ":" in rest.partition("@")[0]:
        raise StorageError(
            f"a {scheme}:// storage URL contains a password; remove it, set it in the environment, "
            "and change it, since URLs are logged"
        )
    if "?" in rest or "#" in rest or ".." in rest.split("/"):
        raise StorageError(f"the storage URL {scheme}://… must not contain '?', '#' or '..'")
    root_url = f"{scheme}://{rest.rstrip('/')}"
    match scheme:
        case "file":
            if urlsplit(root_url).netloc:
                raise StorageError(f"{root_url} is not an absolute path; write file:///like/this")
            return ObjectStore(root_url, LocalBackend(Path(rest)))
        case "memory":
            return ObjectStore(root_url, MemoryBackend(rest.strip("/")))
    from pipeline.storage.remote_store import RemoteBackend

    return ObjectStore(root_url, RemoteBackend(root_url, patience or Patience.configured()))


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise StorageError(
            f"{key[:_LONGEST_KEY]!r} is not a storage key: a relative path of letters, digits and "
            f"._-, at most {_LONGEST_KEY} characters, no segment beginning with a dot"
        )
    return key
