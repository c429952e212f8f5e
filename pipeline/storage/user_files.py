"""Find, open and read files that a user names by path or fsspec URL.

Whatever a storage driver raises becomes one line that names the file and what to check.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec import AbstractFileSystem

from pipeline.errors import PipelineError


def find_given_files(url: str, *, error_type: type[PipelineError]) -> tuple[str, ...]:
    """The files that a path, URL or glob names, sorted.

    A file whose name looks like a glob is that file. Brackets are a glob's set of characters,
    unless files are found only where they are taken as they stand.

    Raises:
        PipelineError: an `error_type`: no such file, a directory, or unreadable storage.
    """
    with driver_errors(url, error_type):
        if "::" in url and not Path(url).exists():
            raise error_type(f"{url}: chained URLs are not supported; name the file itself")
        filesystem, path = _located(url)
        is_directory = filesystem.isdir(path)
        # A file may be readable although its directory must not be listed.
        found = [path] if filesystem.exists(path) else []
        if not found and any(mark in path for mark in "*?["):
            found = _globbed(filesystem, path) or _globbed(filesystem, path.replace("[", "[[]"))
    if is_directory:
        raise error_type(f"{url}: a directory; name its files, such as {url.rstrip('/')}/*.jsonl")
    if not found:
        raise error_type(f"{url}: no such file; check the path, and that this machine can see it")
    return tuple(filesystem.unstrip_protocol(name) for name in found)


def _located(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a path or URL, and the path within it."""
    if url.startswith("file://") or "://" not in url:
        # fsspec's own reading of a URL would take a "::" in a file's name for a chain.
        local = Path(url.removeprefix("file://")).expanduser().absolute()
        return fsspec.filesystem("file"), os.path.normpath(local)
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, str(path)


def _globbed(filesystem: AbstractFileSystem, pattern: str) -> list[str]:
    entries = filesystem.glob(pattern, detail=True)
    # Storage lists in any order.
    return sorted(name for name, entry in entries.items() if entry["type"] == "file")


def open_given_file(url: str, *, decompress: bool = False) -> BinaryIO:
    """Open one file for reading. Storage drivers raise anything: wrap in `driver_errors`.

    Args:
        decompress: decompress a name that ends in .gz, .bz2 or .xz.
    """
    filesystem, path = _located(url)
    compression = "infer" if decompress else None
    opened = fsspec.core.OpenFile(filesystem, path, compression=compression)
    # Not every driver's file object honours the size limit of readline; a buffered reader does.
    return io.BufferedReader(opened.open())


def read_given_text(url: str, *, max_bytes: int, error_type: type[PipelineError]) -> str:
    """Read one whole file of UTF-8 text.

    Raises:
        PipelineError: an `error_type`: no such file, unreadable, or larger than `max_bytes`.
    """
    file, *others = find_given_files(url, error_type=error_type)
    if others:
        raise error_type(f"{url}: names {1 + len(others)} files; name one of them")
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
