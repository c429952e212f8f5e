"""Rows of JSON: one object a line, in files that a user names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from pipeline.errors import PipelineError
from pipeline.storage.user_files import driver_errors, open_given_file


def read_json_lines(
    file: str, *, example: str, max_bytes: int, error_type: type[PipelineError]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands, as `file:line`; blank lines are skipped.

    Args:
        file: as `find_given_files` returns it; decompressed if its name ends in .gz.
        example: an object, for messages.
        max_bytes: of one line.

    Raises:
        PipelineError: an `error_type`: an unreadable file, or a line that is no object.
    """
    with driver_errors(file, error_type):
        stream = open_given_file(file, decompress=True)
    with closing(stream):
        number = 0
        while True:
            with driver_errors(file, error_type):
                line = stream.readline(max_bytes + 1)
            if not line:
                return
            number += 1
            where = f"{file.removeprefix('file://')}:{number}"
            if len(line) > max_bytes:
                raise error_type(f"{where}: a document of more than {max_bytes} bytes; split it")
            if line.strip():
                yield where, _object(line, where, example, error_type)


def _object(
    line: bytes, where: str, example: str, error_type: type[PipelineError]
) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise error_type(
            f"{where}: not JSON: {error}; write one object per line, in UTF-8"
        ) from None
    if not isinstance(row, dict):
        raise error_type(
            f"{where}: holds {type(row).__name__}, not an object such as {example}; write one "
            "object per line"
        )
    return row
