"""What alerts and dashboard ask of Prometheus: names, labels and outcomes that the code emits."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import yaml

_NAME = re.compile(r"\bray_(quantfleet_\w+)")
_WORDS = re.compile(r"\bby \(([^)]*)\)|label_values\([^,]*, (\w+)\)")
_MATCHED = re.compile(r"(\w+)\s*=~?\s*\"")
_SHOWN = re.compile(r"\$labels\.(\w+)")
# Every label that some metric has.
LABELS = {"model", "recipe", "outcome", "stage", "catalog", "result"}


def faults(infra: Path, root: Path) -> list[str]:
    """Each with the file that it stands in."""
    source = (root / "jobs" / "metrics.py").read_text(encoding="utf-8")
    told = _told(root)
    found = []
    for where, query in queries(infra):
        for name in sorted(set(_NAME.findall(query)) - emitted(source)):
            found.append(f"{where}: nothing emits {name}")
        for label in sorted(labels(query) - LABELS):
            found.append(f"{where}: no metric has a label {label}")
        # An alert on an outcome that nothing tells would be silent for ever.
        for pattern in re.findall(r'outcome=~?"([^"]*)"', query):
            if not any(re.fullmatch(pattern, outcome) for outcome in told):
                found.append(f"{where}: no run ends as {pattern}")
    return found


@functools.cache
def _told(root: Path) -> frozenset[str]:
    paths = sorted((root / "jobs").rglob("*.py"))
    return frozenset().union(*(outcomes(path.read_text(encoding="utf-8")) for path in paths))


def queries(infra: Path) -> list[tuple[str, str]]:
    """Every expression, with the file that it stands in."""
    rules = yaml.safe_load((infra / "observability" / "rules.yaml").read_text())
    board = json.loads((infra / "observability" / "dashboard.json").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    shown = [str(rule["annotations"]) for rule in alerts if "annotations" in rule]
    return [
        *(("observability/rules.yaml", text) for text in (*(r["expr"] for r in alerts), *shown)),
        *(
            ("observability/dashboard.json", target["expr"])
            for panel in board["panels"]
            for target in panel["targets"]
        ),
        *(
            ("observability/dashboard.json", variable["query"])
            for variable in board["templating"]["list"]
        ),
    ]


def labels(query: str) -> set[str]:
    """What it groups by, matches or shows."""
    grouped = ", ".join(one or other for one, other in _WORDS.findall(query))
    named = {name.strip() for name in grouped.split(",") if name.strip()}
    return named | set(_MATCHED.findall(query)) | set(_SHOWN.findall(query))


def asked_for(infra: Path) -> set[str]:
    """Names in rules, their tests and the dashboard, without what Ray puts before them."""
    tests = (infra / "observability" / "rules_test.yaml").read_text()
    return set(_NAME.findall("\n".join([*(query for _, query in queries(infra)), tests])))


def emitted(source: str) -> set[str]:
    """Every name of a metric that stands in the code as a literal."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"quantfleet_[a-z_]+", node.value)
    }


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
