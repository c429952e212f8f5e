"""Calibration texts as a stream of documents, from files and Hugging Face data sets.

A source is hf:<owner>/<name>[/<config>][?split=…&config=…&revision=…], hf: with a local folder, or
a path, URL or glob of .jsonl, .parquet or .txt files. A document is a line of .jsonl, a row of
.parquet or a whole .txt; .jsonl and .txt may be compressed (.gz). Sources are interleaved, one
document each in turn. Hub data sets are streamed; code that comes with one is never run.

A row may hold a conversation, a list of messages, where another holds a text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pipeline.calibration.chat import ChatTemplate, contents_alone
from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration
from pipeline.storage.json_lines import read_json_lines
from pipeline.storage.user_files import driver_errors, find_given_files, open_given_file

_T = TypeVar("_T")


def read_texts(calibration: Calibration, template: ChatTemplate | None = None) -> Iterator[str]:
    """Stream the documents that are not blank, of all sources in turn.

    Every source is found, and its first document read, before this returns.

    Args:
        calibration: weights of its texts make no difference.
        template: renders conversations, where `calibration.chat` is true.

    Raises:
        CalibrationTextError: a source that is missing, unreadable, named twice, without any text
            or without such a column; also raised while streaming, for later documents.
    """
    return _interleaved(read_each(calibration, template))


def read_each(
    calibration: Calibration, template: ChatTemplate | None = None
) -> list[Iterator[str]]:
    """The same, source by source."""
    opened = _streams(calibration, template)
    return [_with_first_read(source, documents) for source, documents in opened]


def _streams(
    calibration: Calibration, template: ChatTemplate | None
) -> list[tuple[str, Iterator[str]]]:
    streams: list[tuple[str, Iterator[str]]] = []
    source_of_file: dict[str, str] = {}
    for source, text in zip(calibration.text_urls, calibration.texts, strict=True):
        own_field = None if isinstance(text, str) else text.text_field
        rows = _Rows(own_field or calibration.text_field, calibration.chat, template)
        if source.startswith("hf:"):
            files: tuple[str, ...] = (source,)
            stream = _hub_rows(parse_hub_source(source), rows)
        else:
            found = find_given_files(source, error_type=CalibrationTextError)
            # As people write local paths.
            files = tuple(file.removeprefix("file://") for file in found)
            readers = [(_reader_of(file), file) for file in files]
            stream = chain.from_iterable(read(file, rows) for read, file in readers)
        for file in files:
            if file in source_of_file:
                raise CalibrationTextError(
                    f"{source}: {file} is already read through {source_of_file[file]}; name it once"
                )
            source_of_file[file] = source
        streams.append((source, stream))
    return streams


def _with_first_read(source: str, documents: Iterator[str]) -> Iterator[str]:
    """The documents that are not blank. The first is read now, so that errors show early."""
    filled = (text for text in documents if text.strip())
    first = next(filled, None)
    if first is None:
        raise CalibrationTextError(
            f"{source}: no document has any text; check text_field, or remove the source"
        )
    return chain([first], filled)


def _interleaved(streams: list[Iterator[str]]) -> Iterator[str]:
    while streams:
        remaining = []
        for stream in streams:
            text = next(stream, None)
            if text is not None:
                remaining.append(stream)
                yield text
        streams = remaining


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A Hugging Face data set."""

    source: str
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


def parse_hub_source(source: str) -> HubSource:
    """Parse `hf:<owner>/<name>[/<config>][?split=…&config=…&revision=…]`.

    Raises:
        CalibrationTextError: the source has another form.
    """
    path, _, query = source.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"split", "config", "revision"})
    if unknown or not all(options.values()):
        raise CalibrationTextError(
            f"{source}: unknown or empty option {', '.join(unknown)}; the options after ? are "
            "split=…, config=… and revision=…, joined by &"
        )
    if path.startswith(("/", "./", "../")):
        return HubSource(source=source, name=path, **options)
    parts = path.split("/")
    if not all(parts) or len(parts) > 3 or (len(parts) == 3 and "config" in options):
        raise CalibrationTextError(
            f"{source}: not the name of a data set; write hf:<owner>/<name>[/<config>][?split=…]"
        )
    if len(parts) == 3:
        options["config"] = parts[2]
    return HubSource(source=source, name="/".join(parts[:2]), **options)


def _hub_rows(hub: HubSource, rows: _Rows) -> Iterator[str]:
    # Imported when needed: it takes a second or two.
    import datasets

    with driver_errors(hub.source, CalibrationTextError):
        found = iter(
            datasets.load_dataset(
                hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True
            )
        )
    for number, row in enumerate(_read_on(found, hub.source), 1):
        yield rows.document(row, f"{hub.source}: row {number}")


MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MESSAGES = "messages"
"""The column that holds conversations by convention."""
_SHOWN = 12


def _reader_of(file: str) -> Callable[[str, _Rows], Iterator[str]]:
    """The reader for a file's name, to be called with the file and how to read its rows."""
    name = file.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _json_lines
    if name.endswith(".txt"):
        return _whole_text
    if file.endswith(".parquet"):
        return _parquet_rows
    raise CalibrationTextError(
        f"{file}: cannot tell its format; name files that end in .jsonl, .jsonl.gz, .txt, .txt.gz "
        "or .parquet"
    )


def _read_on(items: Iterator[_T], source: str) -> Iterator[_T]:
    """The same items; errors while reading name the source."""
    while True:
        with driver_errors(source, CalibrationTextError):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _json_lines(file: str, rows: _Rows) -> Iterator[str]:
    found = read_json_lines(
        file,
        example='{"text": "..."}',
        max_bytes=MAX_DOCUMENT_BYTES,
        error_type=CalibrationTextError,
    )
    return (rows.document(row, where) for where, row in found)


def _whole_text(file: str, rows: _Rows) -> Iterator[str]:  # noqa: ARG001 - plain text has none
    with (
        driver_errors(file, CalibrationTextError),
        closing(open_given_file(file, decompress=True)) as stream,
    ):
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    _check_size(content, file)
    try:
        # A text wrapper translates line ends as Python does for text files.
        yield io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalibrationTextError(
            f"{file}:{line}: not UTF-8 text ({error.reason}); convert the file"
        ) from None


def _parquet_rows(file: str, rows: _Rows) -> Iterator[str]:
    import pyarrow.parquet

    with driver_errors(file, CalibrationTextError):
        stream = open_given_file(file)
    with closing(stream):
        with driver_errors(file, CalibrationTextError):
            table = pyarrow.parquet.ParquetFile(stream)
        column = rows.column(table.schema_arrow.names, file)
        batches = table.iter_batches(batch_size=64, columns=[column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        for number, value in enumerate(_read_on(values, file), 1):
            yield rows.document({column: value}, f"{file}: row {number}")


@dataclass(frozen=True)
class _Rows:
    """How the row of a data set becomes a document.

    Attributes:
        text_field: the column that holds it.
        chat: whether conversations are rendered by the template, or their contents taken alone;
            None refuses them.
        template: needed where chat is true.
    """

    text_field: str
    chat: bool | None
    template: ChatTemplate | None

    def column(self, columns: Sequence[str], where: str) -> str:
        """The column to read, of those that are there."""
        wanted = (self.text_field, MESSAGES)
        for name in reversed(wanted) if self.chat else wanted:
            if name in columns:
                return name
        raise CalibrationTextError(
            f"{where}: no column {self.text_field!r}; set calibration.text_field to one of "
            f"{_named(columns) or '(there is none)'}"
        )

    def document(self, row: Mapping[str, Any], where: str) -> str:
        column = self.column(list(row), where)
        value = row[column]
        where_in_row = f"{where}: {column!r}"
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = self._conversation(value, where_in_row)
        if not isinstance(value, str):
            raise CalibrationTextError(
                f"{where_in_row} holds {type(value).__name__}, not text; choose another "
                "text_field, or correct the row"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CalibrationTextError(
                f"{where_in_row} is not Unicode text: its character {error.start + 1} is "
                f"{value[error.start]!a}, half of a surrogate pair; remove it, or write the whole "
                "character"
            ) from None
        return value

    def _conversation(self, messages: list[dict[str, Any]], where: str) -> str:
        for number, message in enumerate(messages, 1):
            if not isinstance(message.get("role"), str):
                raise CalibrationTextError(
                    f"{where}: message {number} has no role; write "
                    '[{"role": "user", "content": "..."}, ...], or choose another text_field'
                )
        if self.chat is None:
            raise CalibrationTextError(
                f"{where} holds conversations; set calibration.chat to true (--chat) to render "
                "them by the model's chat template, or to false (--no-chat) to take their "
                "contents alone"
            )
        if not self.chat or self.template is None:
            return contents_alone(messages)
        # Tables fill up with nulls what a message does not have.
        given = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
        return self.template.render(given, where)


def _named(columns: Sequence[str]) -> str:
    # In a line of JSON a key may be anything, even a whole document.
    names = [name if len(name) <= 40 else f"{name[:40]}…" for name in map(str, columns[:_SHOWN])]
    return ", ".join(names) + (" …" if len(columns) > _SHOWN else "")


def _check_size(content: bytes, where: str) -> None:
    if len(content) > MAX_DOCUMENT_BYTES:
        raise CalibrationTextError(
            f"{where}: a document of more than {MAX_DOCUMENT_BYTES} bytes; split it"
        )
