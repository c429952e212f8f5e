"""Alerts and dashboard ask for metrics that the code emits, by labels that it gives them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.infra.validators import INFRA, ROOT

SOURCE = ROOT / "jobs" / "metrics.py"
_NAME = re.compile(r"\bray_(quantfleet_[a-z_]+)")
_WORDS = re.compile(r"\bby \(([^)]*)\)|label_values\([^,]*, (\w+)\)")
_MATCHED = re.compile(r"(\w+)\s*=~?\s*\"")
# Every label that some metric has.
LABELS = {"model", "recipe", "outcome", "stage", "catalog"}


def queries() -> list[str]:
    rules = yaml.safe_load((INFRA / "observability" / "rules.yaml").read_text())
    board = json.loads((INFRA / "observability" / "dashboard.json").read_text())
    return [
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in board["panels"] for target in panel["targets"]),
        *(variable["query"] for variable in board["templating"]["list"]),
    ]


def asked_for() -> set[str]:
    tests = (INFRA / "observability" / "rules_test.yaml").read_text()
    return set(_NAME.findall("\n".join([*queries(), tests])))


def emitted(source: str) -> set[str]:
    """Every name of a metric that stands in the code as a literal."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"quantfleet_[a-z_]+", node.value)
    }


def test_every_metric_that_is_asked_for_is_emitted() -> None:
    if not SOURCE.exists():
        pytest.skip(f"{SOURCE.relative_to(ROOT)} is not there yet: nothing is emitted")
    assert asked_for() <= emitted(SOURCE.read_text(encoding="utf-8"))


def test_every_metric_that_is_emitted_is_shown() -> None:
    if not SOURCE.exists():
        pytest.skip(f"{SOURCE.relative_to(ROOT)} is not there yet: nothing is emitted")
    assert emitted(SOURCE.read_text(encoding="utf-8")) <= asked_for()


def test_labels_are_those_that_metrics_have() -> None:
    for query in queries():
        grouped = ", ".join(one or other for one, other in _WORDS.findall(query))
        named = {name.strip() for name in grouped.split(",") if name.strip()}
        assert named | set(_MATCHED.findall(query)) <= LABELS, query


def test_every_outcome_that_is_asked_for_is_told() -> None:
    """An alert on an outcome that nothing tells would be silent for ever."""
    sources = sorted((ROOT / "jobs").rglob("*.py"))
    told = set().union(*(outcomes(path.read_text(encoding="utf-8")) for path in sources))
    for query in queries():
        for pattern in re.findall(r'outcome=~?"([^"]*)"', query):
            assert any(re.fullmatch(pattern, outcome) for outcome in told), (pattern, told)


def outcomes(source: str) -> set[str]:
    """Every literal in the argument of a call of `….ended(…)`."""
    return {
        literal.value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "ended"
        for literal in ast.walk(call)
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str)
    }


def test_a_metric_is_found_where_it_stands() -> None:
    assert len(asked_for()) == 8
    assert outcomes('m.ended("a" if isinstance(e, B) else "c")') == {"a", "c"}
    assert emitted('runs = Counter("quantfleet_runs_total", "Runs.")') == {"quantfleet_runs_total"}


def test_no_other_file_asks_for_metrics() -> None:
    asking = {
        path.relative_to(INFRA).parts[0]
        for path in Path(INFRA).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md") and _NAME.search(path.read_text())
    }
    assert asking == {"observability"}
