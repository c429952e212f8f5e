"""Object storage: bytes under keys below one URL, whatever keeps them.

Storage is the truth of a run, so what it says is never taken on trust: reads are checked against
the digest that a record names, and whoever creates an object learns whether others got there first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.canonical import sha256 as sha256_of
from pipeline.errors import (
    DamagedObjectError,
    MissingObjectError,
    ObjectExistsError,
    StorageError,
)
from pipeline.storage.backend import Backend, Patience, Version

# No segment begins with a dot: neither "..", nor the hidden names that backends keep to themselves.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*(?:[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_LONGEST_KEY = 512
# A flipped bit or a cut body in flight is gone at the next read; one at rest is not.
_NUM_READS = 3
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ObjectStore:
    """Objects below `root_url`. Threads may share one; other processes open the URL again.

    Keys are relative paths of letters, digits, `._-` and `/`; no segment begins with a dot.
    Every method raises StorageError where the store cannot be used: a bad key, refused
    credentials, a missing bucket, a full disk, or no answer within the deadline.
    """

    root_url: str
    backend: Backend = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the URL travels: a filesystem object would carry its credentials along.
        return open_store, (self.root_url,)

    def url(self, key: str) -> str:
        """Return the object's full URL."""
        return f"{self.root_url}/{_checked(key)}"

    def get(
        self,
        key: str,
        *,
        sha256: str | None = None,
        size: int | None = None,
        at_most: int | None = None,
    ) -> bytes:
        """Read an object, and make sure that it is the expected one.

        Args:
            sha256: the digest that its bytes must have.
            size: the number of bytes that it must have.
            at_most: the largest number of bytes that it may have; no more are read.

        Raises:
            MissingObjectError: nothing is there.
            DamagedObjectError: other bytes are there, however often they are read, or too many.
        """
        for _ in range(_NUM_READS):
            try:
                if at_most is None:
                    data = self.backend.read(_checked(key), size)
                else:
                    data = self.backend.read_range(_checked(key), 0, at_most + 1)
            except FileNotFoundError as error:
                raise self._missing(key) from error
            if at_most is not None and len(data) > at_most:
                raise DamagedObjectError(
                    f"{self.url(key)} is damaged: it has more than {at_most} bytes"
                )
            if size is not None and len(data) != size:
                problem = f"it has {len(data)} bytes instead of {size}"
            elif sha256 is not None and sha256_of(data) != sha256:
                problem = f"its SHA-256 is {sha256_of(data)} instead of {sha256}"
            else:
                return data
        raise DamagedObjectError(f"{self.url(key)} is damaged: {problem}")

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop), exactly `stop - start` of them.

        Raises:
            MissingObjectError: nothing is there.
            DamagedObjectError: the object ends before `stop`.
        """
        if not 0 <= start <= stop:
            raise StorageError(f"{self.url(key)}: there is no range of bytes {start} to {stop}")
        for _ in range(_NUM_READS):
            try:
                data = self.backend.read_range(_checked(key), start, stop)
            except FileNotFoundError as error:
                raise self._missing(key) from error
            if len(data) == stop - start:
                return data
        raise DamagedObjectError(
            f"{self.url(key)} is damaged: {len(data)} bytes from {start} on instead of "
            f"{stop - start}"
        )

    def verify(self, key: str, *, sha256: str, size: int) -> None:
        """Read an object piece by piece and hash it; needs 64 MiB, however large it is.

        Raises:
            MissingObjectError: nothing is there.
            DamagedObjectError: other bytes are there.
        """
        found = self.size(key)
        if found != size:
            raise DamagedObjectError(
                f"{self.url(key)} is damaged: it has {found} bytes instead of {size}"
            )
        for _ in range(_NUM_READS):
            digest = hashlib.sha256()
            for start in range(0, size, _PIECE_BYTES):
                digest.update(self.get_range(key, start, min(start + _PIECE_BYTES, size)))
            if digest.hexdigest() == sha256:
                return
        raise DamagedObjectError(
            f"{self.url(key)} is damaged: its SHA-256 is {digest.hexdigest()} instead of {sha256}"
        )

    def size(self, key: str) -> int:
        """Return an object's size in bytes.

        Raises:
            MissingObjectError: nothing is there.
        """
        try:
            return self.backend.size(_checked(key))
        except FileNotFoundError as error:
            raise self._missing(key) from error

    def exists(self, key: str) -> bool:
        """Tell whether an object is there."""
        try:
            self.backend.size(_checked(key))
        except FileNotFoundError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over whatever is there: readers see old or new bytes, never both."""
        self.backend.write(_checked(key), data)

    def create(self, key: str, data: bytes) -> None:
        """Write an object once: of several writers with different bytes exactly one succeeds.

        The same bytes already there are success: an acknowledgement that got lost on its way
        makes our own first try look like another's.

        Raises:
            ObjectExistsError: other bytes are there; also a FileExistsError.
        """
        try:
            self.backend.create(_checked(key), data)
        except FileExistsError as error:
            if self.get(key) != data:
                raise ObjectExistsError(
                    f"{self.url(key)} exists with other bytes, and is written only once"
                ) from error

    def replace(self, key: str, data: bytes, *, expected: bytes | None) -> None:
        """Write an object if it still holds what its writer knows of it: compare and set.

        Of several writers who expect the same, exactly one succeeds, unless they write the same.
        The new bytes already there are success, as in `create`: nobody can tell a lost
        acknowledgement from another's writing the same. So bytes that count changes, or name their
        writer, never mislead.

        Args:
            expected: the bytes that are to be there now; None for no object.

        Raises:
            ObjectExistsError: other bytes are there; also a FileExistsError.
            MissingObjectError: bytes were expected, and nothing is there.
        """
        if expected is None:
            self.create(key, data)
            return
        try:
            self.backend.replace(_checked(key), data, expected)
        except FileNotFoundError as error:
            raise self._missing(key) from error
        except FileExistsError as error:
            if self.get(key) != data:
                raise ObjectExistsError(
                    f"{self.url(key)} was changed by somebody else meanwhile; look again"
                ) from error

    def version(self, key: str) -> str:
        """Return a token that is another one once the object was written again.

        It is found without reading the object: on disk from size, times and inode, on S3 from size
        and entity tag.

        Raises:
            MissingObjectError: nothing is there.
        """
        try:
            return self.backend.version(_checked(key)).token
        except FileNotFoundError as error:
            raise self._missing(key) from error

    def versions(self, prefix: str = "") -> Mapping[str, Version]:
        """Return what is known of every object below a prefix, by key, without reading any.

        On S3 that takes one request for a thousand objects. Prefixes are those of `list`.
        """
        if not _PREFIX.fullmatch(prefix):
            raise StorageError(f"{self.root_url}: {prefix!r} is no prefix of a key")
        found = (pair for pair in self.backend.versions(prefix) if _KEY.fullmatch(pair[0]))
        return dict(sorted(found))

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Return every key that begins with `prefix`, sorted. Files that are no keys are left out.

        A prefix may end inside a segment, as "records/block-"; a directory's ends in "/".
        """
        if not _PREFIX.fullmatch(prefix):
            raise StorageError(f"{self.root_url}: {prefix!r} is no prefix of a key")
        return tuple(sorted(filter(_KEY.fullmatch, self.backend.list(prefix))))

    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""
        self.backend.delete(_checked(key))

    def leftovers(self) -> tuple[str, ...]:
        """Return what interrupted writes left behind: of no use, unless one is still under way."""
        return tuple(sorted(self.backend.leftovers()))

    def sweep(self, leftover: str) -> None:
        """Remove one of `leftovers`."""
        if leftover not in self.leftovers():
            raise StorageError(f"{self.root_url}: {leftover!r} is no leftover of a write")
        self.backend.sweep(leftover)

    def _missing(self, key: str) -> MissingObjectError:
        return MissingObjectError(f"{self.url(key)} does not exist")


def open_store(url: str, patience: Patience | None = None) -> ObjectStore:
    """Open the store at a path or URL; nothing is contacted, and nothing has to be there yet.

    Args:
        url: a local path, file://…, memory://… (this process only), s3://bucket/…, or a URL of
            another fsspec filesystem that can create an object only once. Credentials and
            endpoint come from the environment, such as AWS_ENDPOINT_URL, never from the URL.
        patience: how long a remote store may keep us waiting; None for what the environment says.

    Raises:
        StorageError: a URL that cannot be used.
    """
    # These load s3fs and so half a second of other packages, or import this module.
    from pipeline.storage.local_store import LocalBackend
    from pipeline.storage.memory_store import MemoryBackend

    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise StorageError("a storage URL is empty; give a path or a URL such as s3://bucket")
        scheme, rest = "file", str(Path(url).absolute())
    if "@" in rest.partition("/")[0] and ":" in rest.partition("@")[0]:
        raise StorageError(
            f"a {scheme}:// storage URL contains a password; take it out, change it, since URLs "
            "are logged, and give it in the environment"
        )
    if "?" in rest or "#" in rest or ".." in rest.split("/"):
        raise StorageError(f"the storage URL {scheme}://… must hold neither '?', '#' nor '..'")
    root_url = f"{scheme}://{rest.rstrip('/')}"
    match scheme:
        case "file":
            if urlsplit(root_url).netloc:
                raise StorageError(f"{root_url} is no absolute path; write file:///like/this")
            return ObjectStore(root_url, LocalBackend(Path(rest)))
        case "memory":
            return ObjectStore(root_url, MemoryBackend(rest.strip("/")))
    from pipeline.storage.remote_store import RemoteBackend

    return ObjectStore(root_url, RemoteBackend(root_url, patience or Patience.configured()))


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise StorageError(
            f"{key[:_LONGEST_KEY]!r} is no storage key: a relative path of letters, digits and "
            f"._-, no segment beginning with a dot, at most {_LONGEST_KEY} characters"
        )
    return key
