"""Find, open and read files that a user names by path or fsspec URL.

Whatever a storage driver raises becomes one line that names the file and what to check.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec

from pipeline.errors import PipelineError


def find_given_files(url: str, *, error_type: type[PipelineError]) -> tuple[str, ...]:
    """The files that a path, URL or glob names, sorted.

    Raises:
        PipelineError: an `error_type`: no such file, a directory, or unreadable storage.
    """
    if "::" in url:
        raise error_type(f"{url}: chained URLs are not supported; name the file itself")
    with driver_errors(url, error_type):
        filesystem, path = fsspec.core.url_to_fs(url)
        is_glob = any(mark in path for mark in "*?[")
        is_directory = not is_glob and filesystem.isdir(path)
        if is_glob:
            # Storage lists in any order.
            entries = filesystem.glob(path, detail=True)
            found = sorted(name for name, entry in entries.items() if entry["type"] == "file")
        else:
            # A file may be readable although its directory must not be listed.
            found = [path] if filesystem.exists(path) else []
    if is_directory:
        raise error_type(f"{url}: a directory; name its files, such as {url.rstrip('/')}/*.jsonl")
    if not found:
        raise error_type(f"{url}: no such file; check the path, and that this machine can see it")
    return tuple(filesystem.unstrip_protocol(name) for name in found)


def open_given_file(url: str, *, decompress: bool = False) -> BinaryIO:
    """Open one file for reading. Storage drivers raise anything: wrap in `driver_errors`.

    Args:
        decompress: decompress a name that ends in .gz, .bz2 or .xz.
    """
    opened = fsspec.open(url, "rb", compression="infer" if decompress else None)
    # Not every driver's file object honours the size limit of readline; a buffered reader does.
    return io.BufferedReader(opened.open())


def read_given_text(url: str, *, max_bytes: int, error_type: type[PipelineError]) -> str:
    """Read one whole file of UTF-8 text.

    Raises:
        PipelineError: an `error_type`: no such file, unreadable, or larger than `max_bytes`.
    """
    [file] = find_given_files(url, error_type=error_type)
    with driver_errors(url, error_type), open_given_file(file) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error_type(f"{url}: more than {max_bytes} bytes; is it the right file?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise error_type(f"{url}:{line}: not UTF-8 text; save the file as UTF-8") from None


@contextmanager
def driver_errors(where: str, error_type: type[PipelineError]) -> Iterator[None]:
    """Turn any exception into one line that says why `where` cannot be read.

    Use it around calls of storage drivers and format readers only. They share no base exception,
    not even OSError (botocore's credential errors are not), so everything has to be caught.
    """
    try:
        yield
    except PipelineError:
        raise
    except FileNotFoundError as error:
        raise error_type(f"{where}: not found; check the path ({_one_line(error)})") from error
    except Exception as error:
        raise error_type(f"{where}: cannot be read: {_reason(where, error)}") from error


def _reason(where: str, error: Exception) -> str:
    if where.startswith(("s3://", "s3a://")):
        from pipeline.storage.remote_errors import FAILURES, classify

        if isinstance(error, FAILURES):
            return classify(error).text
    return f"{type(error).__name__}: {_one_line(error)}; check the file, and that it is in reach"


def _one_line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
