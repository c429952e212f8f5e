"""Calibration texts as a stream of documents, from files and Hugging Face data sets.

A source is one of

    hf:<owner>/<name>[/<config>][?split=…&config=…&revision=…]   a data set of the hub
    hf:/path/of/a/data set[?split=…]                             one in a directory
    any fsspec path, URL or glob of .jsonl, .parquet or .txt     files, read in sorted order

A line of .jsonl and a row of .parquet is a document, and so is a whole .txt; .jsonl and .txt may
be compressed (.gz). Sources take turns, a document each, until all are used up. Nothing runs
code that comes with a data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from pipeline.calibration.document_files import reader_of
from pipeline.calibration.given_files import find_given_files
from pipeline.calibration.hub_texts import hub_rows, parse_hub_source
from pipeline.errors import CalibrationTextError
from pipeline.recipe.recipe import Calibration


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
            files = find_given_files(source, kind=CalibrationTextError)
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
