"""What commands print of a finished result: its summary, how to load it, its report, exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.logging import is_json, log_event, print_json
from jobs.report.run_report import report_place
from jobs.run_exports import exports_json, log_exports
from jobs.summary import Summary, summary_table
from pipeline.artifact.loading import load_hints
from pipeline.export.description import MadeExport
from pipeline.storage.object_store import ObjectStore


def print_finished(
    summary: Summary,
    store: ObjectStore,
    exports: Sequence[MadeExport],
    *,
    as_json: bool,
    composed: str = "",
    values: Mapping[str, Any] | None = None,
) -> None:
    """Print a result's summary, how to load it, its report and its exports.

    Args:
        store: opened at its root.
        composed: of a composition, which result was kept, and why.
        values: in JSON, beside its exports; None for the summary alone.
    """
    if as_json:
        told = summary.to_dict() if values is None else dict(values)
        print_json(told | exports_json(exports))
    if not as_json or is_json():
        log_event("finished", "", {"summary": summary.to_dict()}, table=summary_table(summary))
        if composed:
            log_event("composed", composed)
        for hint in load_hints(store):
            log_event("loadable", hint)
        log_event("reported", f"report:  {report_place(store)}")
        log_exports(exports)
