"""What the dashboard asks, answered by Prometheus' own engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.infra.metric_names import queries
from tests.infra.validators import INFRA, prometheus_rules_tests

pytestmark = [pytest.mark.infra, pytest.mark.exhaustive]


def test_entries_are_those_of_the_last_pass_whichever_process_told_them(tmp_path: Path) -> None:
    [asked] = [query for _, query in queries(INFRA) if "ray_quantfleet_entries" in query]
    # A day apart: two processes of one cluster, then one of a new cluster, which counts anew.
    passes = [
        ("a", "01", "", {"failed": 2, "published": 5}),
        ("a", "02", "_x24 ", {"failed": 0, "published": 7}),
        ("b", "02", "_x48 ", {"failed": 1, "published": 6}),
    ]
    series = []
    for number, (session, worker, before, found) in enumerate(passes):
        process = f"catalog='c', SessionName='{session}', WorkerId='{worker}'"
        told = {f"entries{{{process}, result='{one}'}}": value for one, value in found.items()}
        told[f"pass_timestamp_seconds{{{process}}}"] = 86400 * (number + 1)
        series += [
            {"series": f"ray_quantfleet_{name}", "values": f"{before}{value}x2 stale"}
            for name, value in told.items()
        ]
    expected = {
        "20h": {"failed": 2, "published": 5},
        "30h": {"published": 7},
        "90h": {"failed": 1, "published": 6},
    }
    tests = [
        {
            "expr": asked,
            "eval_time": time,
            "exp_samples": [
                {"labels": f"{{catalog='c', result='{result}'}}", "value": value}
                for result, value in found.items()
            ],
        }
        for time, found in expected.items()
    ]
    file = tmp_path / "test.yaml"
    file.write_text(
        yaml.safe_dump(
            {"tests": [{"interval": "1h", "input_series": series, "promql_expr_test": tests}]}
        )
    )
    assert prometheus_rules_tests(file) == []
