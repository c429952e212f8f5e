"""Files that a user names, by path or fsspec URL: found, opened, read.

Whatever a storage driver raises becomes one line that says which file and what to check.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec

from pipeline.errors import PipelineError


def find_given_files(url: str, *, kind: type[PipelineError]) -> tuple[str, ...]:
    """The files that a path, URL or glob names, sorted.

    Raises:
        PipelineError: of `kind`; no such file, a directory, or storage that cannot be listed.
    """
    if "::" in url:
        raise kind(f"{url}: chained URLs are not read; name the file itself")
    with driver_errors(url, kind):
        filesystem, path = fsspec.core.url_to_fs(url)
        if not any(mark in path for mark in "*?["):
            # A file may be readable where its directory may not be listed.
            is_directory = filesystem.isdir(path)
            found = [path] if not is_directory and filesystem.exists(path) else []
        else:
            is_directory = False
            # Sorted, since listings come in the order of the storage's liking.
            entries = filesystem.glob(path, detail=True)
            found = sorted(name for name, entry in entries.items() if entry["type"] == "file")
    if is_directory:
        raise kind(f"{url}: a directory; name its files, such as {url.rstrip('/')}/*.jsonl")
    if not found:
        raise kind(f"{url}: no such file; check the path, and that this machine can see it")
    return tuple(filesystem.unstrip_protocol(name) for name in found)


def open_given_file(url: str, *, decompress: bool = False) -> BinaryIO:
    """Open one file for reading; its driver raises what it likes (see `driver_errors`).

    Args:
        url: a path or fsspec URL.
        decompress: undo a .gz, .bz2 or .xz at the end of the name.
    """
    opened = fsspec.open(url, "rb", compression="infer" if decompress else None)
    # Buffered, since not every driver's files limit the length of a line.
    return io.BufferedReader(opened.open())


def read_given_file(url: str, *, max_bytes: int, kind: type[PipelineError]) -> bytes:
    """Read one whole file.

    Raises:
        PipelineError: of `kind`; no such file, unreadable, or larger than `max_bytes`.
    """
    [file] = find_given_files(url, kind=kind)
    with driver_errors(url, kind), open_given_file(file) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise kind(f"{url}: more than {max_bytes} bytes; is it the right file?")
    return content


@contextmanager
def driver_errors(where: str, kind: type[PipelineError]) -> Iterator[None]:
    """Say in one line that `where` cannot be read.

    For calls of storage drivers and format readers alone: each has exceptions of its own, and
    not even OSError is common to them (botocore's, for credentials, is not one).
    """
    try:
        yield
    except PipelineError:
        raise
    except FileNotFoundError as error:
        raise kind(f"{where}: not found; check the path ({_one_line(error)})") from error
    except Exception as error:
        raise kind(f"{where}: cannot be read: {_reason(where, error)}") from error


def _reason(where: str, error: Exception) -> str:
    if where.startswith(("s3://", "s3a://")):
        from pipeline.storage.remote_errors import FAILURES, judge

        if isinstance(error, FAILURES):
            return judge(error).text
    return f"{type(error).__name__}: {_one_line(error)}; check the file, and that it is in reach"


def _one_line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
