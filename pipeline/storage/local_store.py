"""A store on a local disk, or on a file system mounted by several machines."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.storage.backend import Backend, Version

_REMEDIES = {
    errno.EACCES: "no permission; check owner and mode",
    errno.EPERM: "not permitted; check owner and mode, and that hard links are supported",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "the disk quota is used up; free some space and start again",
    errno.ENOTSUP: "the file system lacks hard links, which are needed to create a file only once",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter path",
    errno.EIO: "the disk failed to read or write; check its health",
}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")


class LocalBackend(Backend):
    """Files below a directory, written so that a crash at any moment leaves only whole files.

    A crash may leave temporary files beside their targets, hidden from listings by a leading dot.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str, num_bytes: int | None) -> bytes:  # noqa: ARG002 - for remote stores
        with self._explained(key) as path:
            return path.read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with self._explained(key) as path, path.open("rb") as file:
            file.seek(start)
            # As much as is asked for would be reserved.
            there = os.fstat(file.fileno()).st_size
            return file.read(max(0, min(stop, there) - start))

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key) as path, _temporary(path, data) as temporary:
            temporary.replace(path)

    def create(self, key: str, data: bytes) -> None:
        with self._explained(key) as path:
            if path.exists():
                raise FileExistsError(path)
            # Linking fails if the name is taken: the only atomic create that includes the content.
            with _temporary(path, data) as temporary:
                path.hardlink_to(temporary)

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        with self._explained(key) as path, _locked(path):
            if path.read_bytes() != expected:
                raise FileExistsError(path)
            with _temporary(path, data) as temporary:
                temporary.replace(path)

    def version(self, key: str) -> Version:
        with self._explained(key) as path:
            known = path.stat()
            if stat.S_ISDIR(known.st_mode):
                raise FileNotFoundError(path)
            return _version(known)

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        for key, path in self._files(prefix.rpartition("/")[0]):
            if key.startswith(prefix):
                with self._explained(key):
                    try:
                        known = os.stat(path)  # noqa: PTH116 - of thousands of files
                    except FileNotFoundError:  # deleted since the listing
                        continue
                    if not stat.S_ISDIR(known.st_mode):
                        yield key, _version(known)

    def list(self, prefix: str) -> Iterator[str]:
        return (k for k, _ in self._files(prefix.rpartition("/")[0]) if k.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._explained(key) as path:
            path.unlink(missing_ok=True)

    def leftovers(self) -> Iterator[str]:
        return (key for key, _ in self._files("") if _TEMPORARY.fullmatch(key.rpartition("/")[2]))

    def _files(self, directory: str) -> Iterator[tuple[str, str]]:
        """Yield every file below a directory: relative to the root, and its path."""
        top = str(self._root).rstrip("/") + "/"
        with self._explained(directory):
            for folder, folders, names in os.walk(f"{top}{directory}", onerror=_unless_absent):
                folders[:] = [name for name in folders if name[0] != "."]  # not ours
                start = folder if folder.endswith("/") else f"{folder}/"
                for name in names:
                    yield f"{start.removeprefix(top)}{name}", f"{start}{name}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[Path]:
        try:
            yield self._root / key
        except (IsADirectoryError, NotADirectoryError) as error:
            # Object storage has no directories, so there is no object of this name.
            raise FileNotFoundError(self._root / key) from error
        except OSError as error:
            if error.errno not in _REMEDIES:
                raise
            raise StorageError(f"{self._root / key}: {_REMEDIES[error.errno]}") from error


def file_version(path: Path) -> Version:
    """A file's version. Programs can reset its mtime, but not its ctime."""
    return _version(path.stat())


def _version(known: os.stat_result) -> Version:
    token = f"{known.st_size}-{known.st_mtime_ns}-{known.st_ctime_ns}-{known.st_ino}"
    return Version(token=token, size_bytes=known.st_size, modified=known.st_mtime)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock under which a file is replaced."""
    if not path.parent.is_dir():
        raise FileNotFoundError(path)
    # The lock file is never removed: two processes could then lock two different files.
    with (path.parent / f".{path.name[:100]}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A durable temporary file with `data` beside `path`; so are renames and links in the block."""
    _make_directory(path.parent)
    if path.is_dir():
        raise StorageError(f"{path}: a directory of this name is in the way; move it")
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        if path.is_file():
            raise StorageError(
                f"{path}: a file of this name is where a directory is needed; move it"
            )
        try:
            path.mkdir(exist_ok=True)
        except FileNotFoundError:  # although its parent is there, such as /proc
            raise StorageError(f"{path}: no folder can be made there; choose another") from None
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_absent(error: OSError) -> None:
    # os.walk ignores errors by default, which would make a listing silently incomplete.
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
