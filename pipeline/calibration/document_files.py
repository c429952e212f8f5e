"""Files as streams of documents: a line of .jsonl, a row of .parquet, a whole .txt."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import count
from typing import Any

from pipeline.calibration.given_files import driver_errors, open_given_file
from pipeline.errors import CalibrationTextError

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024

Reader = Callable[[str, str], Iterator[str]]


def reader_of(file: str) -> Reader:
    """What reads a file of this name: called with the file and the field of its documents.

    Raises:
        CalibrationTextError: a name that tells no format that is known.
    """
    name = file.removesuffix(".gz")
    for suffix, read in ((".jsonl", _json_lines), (".txt", _whole_text)):
        if name.endswith(suffix):
            return read
    if file.endswith(".parquet"):
        return _parquet_rows
    raise CalibrationTextError(
        f"{file}: cannot tell its format; name files that end in .jsonl, .jsonl.gz, .txt, .txt.gz "
        "or .parquet"
    )


def _json_lines(file: str, text_field: str) -> Iterator[str]:
    with driver_errors(file, CalibrationTextError):
        stream = open_given_file(file, decompress=True)
    with closing(stream):
        for number in count(1):
            where = f"{file}:{number}"
            with driver_errors(file, CalibrationTextError):
                line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            _check_size(line, where)
            if line.strip():
                yield document_in(_json_object(line, where), text_field, where)


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationTextError(
            f"{where}: no JSON: {error}; write one object a line, in UTF-8"
        ) from None
    if not isinstance(row, dict):
        raise CalibrationTextError(
            f"{where}: a {type(row).__name__} where an object such as "
            '{"text": "..."} was expected; write one object a line'
        )
    return row


def _whole_text(file: str, text_field: str) -> Iterator[str]:  # noqa: ARG001  (a text has no fields)
    with (
        driver_errors(file, CalibrationTextError),
        closing(open_given_file(file, decompress=True)) as stream,
    ):
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    _check_size(content, file)
    try:
        # Line ends as Python reads them from a text file.
        yield io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalibrationTextError(
            f"{file}:{line}: not UTF-8 text ({error.reason}); convert the file"
        ) from None


def _parquet_rows(file: str, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    with driver_errors(file, CalibrationTextError):
        stream = open_given_file(file)
    with closing(stream):
        with driver_errors(file, CalibrationTextError):
            table = pyarrow.parquet.ParquetFile(stream)
        _check_column(table.schema_arrow.names, text_field, file)
        batches = table.iter_batches(batch_size=64, columns=[text_field])
        number = 0
        while True:
            with driver_errors(file, CalibrationTextError):
                batch = next(batches, None)
            if batch is None:
                return
            for text in batch.column(0).to_pylist():
                number += 1
                yield document_in({text_field: text}, text_field, f"{file}: row {number}")


def document_in(row: Mapping[str, Any], text_field: str, where: str) -> str:
    """One row's document.

    Raises:
        CalibrationTextError: no such column, with those there are; or no text in it.
    """
    _check_column(list(row), text_field, where)
    text = row[text_field]
    if not isinstance(text, str):
        raise CalibrationTextError(
            f"{where}: {text_field!r} holds {type(text).__name__}, not text; choose another "
            "text_field, or mend the row"
        )
    return text


def _check_column(columns: Sequence[str], text_field: str, where: str) -> None:
    if text_field not in columns:
        raise CalibrationTextError(
            f"{where}: no column {text_field!r}; set calibration.text_field to one of "
            f"{', '.join(map(str, columns)) or '(there is none)'}"
        )


def _check_size(content: bytes, where: str) -> None:
    if len(content) > MAX_DOCUMENT_BYTES:
        raise CalibrationTextError(
            f"{where}: a document of more than {MAX_DOCUMENT_BYTES} bytes; split it"
        )
