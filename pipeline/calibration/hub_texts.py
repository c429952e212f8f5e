"""Hugging Face data sets as a stream of documents; only what is read is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from urllib.parse import parse_qsl

from pipeline.calibration.document_files import document_in
from pipeline.calibration.given_files import driver_errors
from pipeline.errors import CalibrationTextError


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
