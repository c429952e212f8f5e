from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import jinja2
import pytest

from jobs.release.contents import read_run
from jobs.report.page import _environment, page
from jobs.report.run_report import run_report
from pipeline.storage.object_store import open_store
from tests.jobs.release.runs import finished

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028"


def test_the_policy_names_exactly_the_scripts_that_the_page_carries() -> None:
    run = str(finished())
    text = run_report(read_run(open_store(run), run)).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == 2
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {allowed};" in policy
    assert policy.startswith("default-src 'none'")
    loaded = re.findall(r"""(?:src|href)=["']?(\S*)""", text.partition("<script>")[0])
    assert loaded
    assert all(one.startswith(("data:", "#")) for one in loaded)


def test_a_page_carries_the_licenses_of_its_scripts_in_one_comment() -> None:
    run = str(finished())
    text = run_report(read_run(open_store(run), run)).decode()
    [comment] = re.findall(r"<!--(.*?)-->", text.partition("<script>")[0], re.S)
    assert "Interactive Data Lab" in comment
    assert "Redistributions in binary form must reproduce" in comment
    assert "--" not in comment


def test_data_in_a_page_cannot_end_its_script() -> None:
    template = _environment().from_string("{{ value | json_data }}")
    text = template.render(value={HOSTILE: [HOSTILE, 1.5, None]})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5, None]}


def test_values_are_escaped_and_a_missing_one_is_an_error() -> None:
    assert _environment().from_string("{{ value }}").render(value=HOSTILE) == html.escape(
        HOSTILE
    ).replace("&quot;", "&#34;")
    with pytest.raises(jinja2.UndefinedError):
        page("run_report.html.jinja", [])
