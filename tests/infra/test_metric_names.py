"""Alerts and dashboard ask for metrics that the code emits, by labels that it gives them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.infra.metric_names import asked_for, emitted, faults, outcomes
from tests.infra.validators import INFRA, ROOT

pytestmark = pytest.mark.infra

SOURCE = (ROOT / "jobs" / "metrics.py").read_text(encoding="utf-8")


def test_what_is_asked_for_is_emitted_with_these_labels_and_outcomes() -> None:
    assert faults(INFRA, ROOT) == []
    assert asked_for(INFRA) <= emitted(SOURCE)


def test_every_metric_that_is_emitted_is_shown() -> None:
    assert emitted(SOURCE) <= asked_for(INFRA)


def test_a_metric_is_found_where_it_stands() -> None:
    assert len(asked_for(INFRA)) == 12
    assert outcomes('m.ended("a" if isinstance(e, B) else "c")') == {"a", "c"}
    assert emitted('runs = Counter("quantfleet_runs_total", "Runs.")') == {"quantfleet_runs_total"}


def test_no_other_file_asks_for_metrics() -> None:
    name = re.compile(r"\bray_quantfleet_")
    asking = {
        path.relative_to(INFRA).parts[0]
        for path in Path(INFRA).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md") and name.search(path.read_text())
    }
    assert asking == {"observability"}
