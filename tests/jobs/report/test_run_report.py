from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.report.run_report import REPORT_KEY, update_report
from pipeline.run.commits import read_manifest
from pipeline.storage.object_store import ObjectStore
from tests.jobs.release.runs import copied, evaluate


@pytest.fixture
def run(tmp_path: Path) -> ObjectStore:
    return copied(tmp_path / "run")


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    code: Any = stopped.value.code
    return int(code)


def test_a_report_says_what_was_made_of_what_and_how_good_it_is(run: ObjectStore) -> None:
    update_report(run)
    text = run.get(REPORT_KEY).decode()
    assert "This result was not evaluated" in text
    evaluate(run)
    update_report(run)
    text = run.get(REPORT_KEY).decode()
    assert "This result was not evaluated" not in text
    for said in (
        "<h1>tiny-mistral",
        "20 → 22",
        "90.9%",
        "<code>apache-2.0</code>",
        read_manifest(run).record_sha256,
        "MistralCausalLM.from_preset(&#34;artifact&#34;)",
        'id="sizes"',
    ):
        assert said in text


def test_equal_records_give_equal_pages(run: ObjectStore) -> None:
    update_report(run)
    first = run.get(REPORT_KEY)
    update_report(run)
    assert run.get(REPORT_KEY) == first


def test_the_command_writes_into_the_run_or_where_it_is_told(
    run: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run.root_url, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["size_bytes"] == len(run.get(REPORT_KEY))
    assert Path(printed["url"]).read_bytes() == run.get(REPORT_KEY)
    assert command(run.root_url, "--to", str(tmp_path / "page.html")) == 0
    assert (tmp_path / "page.html").read_bytes() == run.get(REPORT_KEY)


def test_what_is_no_run_or_no_page_is_refused_in_one_line(
    run: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(tmp_path / "nothing")) == 4
    assert command(run.root_url, "--to", str(tmp_path / "page")) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "ends in .html" in told[1]
    assert not (tmp_path / "page").exists()
