"""Calibration texts as a stream of documents, from files and Hugging Face data sets.

A source is one of

    hf:<owner>/<name>[/<config>][?split=…&config=…&revision=…]   a data set of the hub
    hf:/path/of/a/data set[?split=…]                             one in a directory
    any fsspec path, URL or glob of .jsonl, .parquet or .txt     files, read in sorted order

A line of .jsonl and a row of .parquet is a document, and so is a whole .txt; .jsonl and .txt may
be compressed (.gz). Sources take turns, a document each, until all are used up. Nothing runs
code that comes with a data set.

Hugging Face data sets as a stream of documents; only what is read is fetched.

Files as streams of documents: a line of .jsonl, a row of .parquet, a whole .txt.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count
from typing import Any
from urllib.parse import parse_qsl

from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration
from pipeline.storage.user_files import driver_errors, find_given_files, open_given_file


def read_texts(calibration: Calibration) -> Iterator[str]:
    """Stream the documents that have any text.

    Every source is found, and its first document read, before this returns.

    Args:
        calibration: `texts` names the sources, `text_field` the column that holds a document.

    Raises:
        CalibrationTextError: a source that is missing, unreadable, named twice or without any
            text, or has no such column; also, for what lies further in, while streaming.
    """
    opened = _openers(calibration.texts, calibration.text_field)
    streams = [_begun(source, documents) for source, documents in opened]
    return _taking_turns(streams)


def _openers(sources: Sequence[str], text_field: str) -> list[tuple[str, Iterator[str]]]:
    streams: list[tuple[str, Iterator[str]]] = []
    origin: dict[str, str] = {}  # of each file
    for source in sources:
        if source.startswith("hf:"):
            files: tuple[str, ...] = (source,)
            stream = hub_rows(parse_hub_source(source), text_field)
        else:
            files = find_given_files(source, error_type=CalibrationTextError)
            readers = [(reader_of(file), file) for file in files]
            stream = chain.from_iterable(read(file, text_field) for read, file in readers)
        for file in files:
            if file in origin:
                raise CalibrationTextError(
                    f"{source}: {file} is already read through {origin[file]}; name it once"
                )
            origin[file] = source
        streams.append((source, stream))
    return streams


def _begun(source: str, documents: Iterator[str]) -> Iterator[str]:
    """The documents that are not blank; the first is read now, to meet errors early."""
    filled = (text for text in documents if text.strip())
    first = next(filled, None)
    if first is None:
        raise CalibrationTextError(
            f"{source}: not one document with text in it; check text_field, or drop the source"
        )
    return chain([first], filled)


def _taking_turns(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        going = []
        for stream in streams:
            text = next(stream, None)
            if text is not None:
                going.append(stream)
                yield text
        streams = going


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A Hugging Face data set, as a source names it."""

    source: str
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


def parse_hub_source(source: str) -> HubSource:
    """Take `hf:<owner>/<name>[/<config>][?split=…&config=…&revision=…]` apart.

    Raises:
        CalibrationTextError: another form.
    """
    path, _, query = source.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"split", "config", "revision"})
    if unknown or not all(options.values()):
        raise CalibrationTextError(
            f"{source}: unknown or empty option {', '.join(unknown)}; after the ? may come "
            "split=…, config=… and revision=…, joined by &"
        )
    if path.startswith(("/", "./", "../")):
        return HubSource(source=source, name=path, **options)
    parts = path.split("/")
    if not all(parts) or len(parts) > 3 or (len(parts) == 3 and "config" in options):
        raise CalibrationTextError(
            f"{source}: no data set's name; write hf:<owner>/<name>[/<config>][?split=…]"
        )
    if len(parts) == 3:
        options["config"] = parts[2]
    return HubSource(source=source, name="/".join(parts[:2]), **options)


def hub_rows(hub: HubSource, text_field: str) -> Iterator[str]:
    """Stream a data set's documents.

    Raises:
        CalibrationTextError: no such data set, configuration, split or column; or out of reach.
    """
    # Here, since it takes a second or two.
    import datasets

    with driver_errors(hub.source, CalibrationTextError):
        rows = iter(
            datasets.load_dataset(
                hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True
            )
        )
    for number in count(1):
        with driver_errors(hub.source, CalibrationTextError):
            row = next(rows, None)
        if row is None:
            return
        yield document_in(row, text_field, f"{hub.source}: row {number}")


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
