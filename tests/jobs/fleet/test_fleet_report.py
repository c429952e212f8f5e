"""A fleet's page follows from storage alone, names what needs a hand, and escapes everything."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import html
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import main
from jobs.fleet.fleet_report import FLEET_PAGE_KEY, find_fleet, fleet_report, update_fleet_report
from jobs.fleet.nights import NIGHTS_PREFIX, Clock, NightEntry, save_night
from jobs.publish.releases import Current
from pipeline.fidelity import Fidelity
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.large_catalog import catalog_text, done_catalog
from tests.jobs.fleet.sample_fleet import lines, sample_page
from tests.jobs.report.test_page import HOSTILE


def rows_of(page: bytes) -> dict[str, str]:
    """The table's rows, by the model that they name."""
    [table] = re.findall(rb'<table id="entries-table".*?</table>', page, re.S)
    rows = re.findall(r"<tr data-state.*?</tr>", table.decode(), re.S)
    return {re.findall(r"\bm\d{4}\b", row)[0]: row for row in rows}


def words_of(row: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", row)).split())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a catalog's folder: three models are published, one of them with a report."""
    folder = str(tmp_path_factory.mktemp("fleet"))
    done_catalog(folder, 3)
    Path(folder, "catalog.yaml").write_text(catalog_text(folder, 3))
    root = open_store(f"{folder}/fleet")
    [run] = {key.split("/")[1] for key in root.list("runs/") if key.startswith("runs/m0001")}
    root.put(f"runs/{run}/report.html", b"")
    return folder


@pytest.fixture
def root(url: str) -> ObjectStore:
    root = open_store(f"{url}/fleet")
    for key in root.list(NIGHTS_PREFIX):
        root.delete(key)
    return root


def test_every_release_has_a_line_and_leads_to_its_run_s_report(root: ObjectStore) -> None:
    page = fleet_report(root, to_root="../")
    assert page == fleet_report(root, to_root="../")
    rows = rows_of(page)
    assert list(rows) == ["m0000", "m0001", "m0002"]
    assert words_of(rows["m0000"]).startswith("m0000 int8 published, release 1 – 2.0 KiB → 600 B")
    linked = {name: re.findall(r'href="([^"]*)"', row) for name, row in rows.items()}
    [run] = {key.split("/")[1] for key in root.list("runs/") if key.startswith("runs/m0001")}
    assert linked == {"m0000": [], "m0001": [f"../runs/{run}/report.html"], "m0002": []}
    assert b"Needs a hand" not in page


def night_of(root: ObjectStore, model: str, result: str, text: str, *, year: int = 2100) -> None:
    entry = NightEntry(
        model=model, recipe="int8", request_id="", result=result, reasons=("source moved",),
        text=text,
    )  # fmt: skip
    began = datetime.datetime(year, 11, 30, 2, 15, tzinfo=datetime.UTC)
    save_night(root, Clock(began).night("my catalog.yaml", 3, [entry]))


def test_what_failed_last_night_says_why_and_how_to_mend_it(root: ObjectStore) -> None:
    night_of(root, "m0002", "failed", "s3://gone: no config.json there")
    night_of(root, "m0009", "gate failed", "divergence 0.2 nats, more than 0.1")
    page = fleet_report(root, to_root="../")
    [broken] = re.findall(r'id="broken".*?</section>', page.decode(), re.S)
    told = words_of(broken)
    assert "m0002 int8 s3://gone: no config.json there Mend what it names; then" in told
    assert "quantfleet nightly 'my catalog.yaml' --only m0002" in told
    assert "m0009 int8 divergence 0.2 nats, more than 0.1 Choose a finer recipe" in told
    # It was never requested, so that only the night knows it.
    assert "not started" in words_of(rows_of(page)["m0009"])
    assert "failed source moved" in words_of(rows_of(page)["m0002"])


def test_what_was_published_since_it_failed_needs_no_hand(root: ObjectStore) -> None:
    night_of(root, "m0002", "failed", "no workers", year=2020)
    assert b"Needs a hand" not in fleet_report(root, to_root="../")


def test_nights_are_drawn_once_there_are_two_to_compare(root: ObjectStore) -> None:
    night_of(root, "m0002", "published", "", year=2029)
    assert b'id="nights"' not in fleet_report(root, to_root="../")
    night_of(root, "m0002", "published", "", year=2030)
    assert b'id="nights"' in fleet_report(root, to_root="../")


def test_a_damaged_night_is_told(root: ObjectStore) -> None:
    root.put(f"{NIGHTS_PREFIX}20261231T000000-00.json", b"{}")
    assert b"Records of nights that cannot be read: 1." in fleet_report(root, to_root="../")


def test_the_command_tells_a_fleet_from_a_run_by_what_lies_there(
    url: str, root: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root.delete(FLEET_PAGE_KEY)
    for given in (f"{url}/catalog.yaml", f"{url}/fleet"):
        with pytest.raises(SystemExit) as ended:
            main(["report", given])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"report: {url}/fleet/{FLEET_PAGE_KEY}\n"
        assert list(rows_of(root.get(FLEET_PAGE_KEY))) == ["m0000", "m0001", "m0002"]
        root.delete(FLEET_PAGE_KEY)
    with pytest.raises(SystemExit):
        main(["report", f"{url}/fleet", "--to", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_bytes()
    [link] = re.findall(r'href="([^"]*)"', rows_of(page)["m0001"])
    assert link.startswith(f"file://{url}/fleet/runs/m0001")
    assert not root.exists(FLEET_PAGE_KEY)
    run = next(key for key in root.list("runs/") if key.endswith("manifest.json"))
    assert find_fleet(f"{url}/fleet/{run.rpartition('/')[0]}") is None


def test_a_catalog_s_entries_without_anything_are_shown(url: str, root: ObjectStore) -> None:
    Path(url, "more.yaml").write_text(catalog_text(url, 5))
    found = find_fleet(f"{url}/more.yaml")
    assert found is not None
    rows = rows_of(fleet_report(*found, to_root="../"))
    assert words_of(rows["m0004"]) == "m0004 int8 not started –"


@pytest.mark.parametrize("of_later_version", ["gate", "quality"])
def test_a_release_of_a_later_version_has_its_line(
    root: ObjectStore, of_later_version: str
) -> None:
    key = "models/m0001/int8/current.json"
    before = root.get(key)
    current = Current.from_json(before)
    figures = Fidelity(num_windows=1, count=1, divergence=0.1).figures()
    known = dataclasses.replace(
        current.release, gate={"max_divergence": 0.4}, quality=figures, source_bytes=1 << 30
    )
    try:
        root.put(key, dataclasses.replace(current, release=known).to_json())
        assert "25%, divergence" in words_of(rows_of(fleet_report(root, to_root="../"))["m0001"])
        more = {**getattr(known, of_later_version), "later": 1}
        later = dataclasses.replace(known, **{of_later_version: more})
        root.put(key, dataclasses.replace(current, release=later).to_json())
        assert "1.0 GiB" in words_of(rows_of(fleet_report(root, to_root="../"))["m0001"])
    finally:
        root.put(key, before)


def test_writing_the_page_again_changes_nothing(root: ObjectStore) -> None:
    update_fleet_report(root)
    before = {key: root.get(key) for key in root.list()}
    update_fleet_report(root)
    assert {key: root.get(key) for key in root.list()} == before


def test_hostile_names_reach_the_page_as_text_alone() -> None:
    page = sample_page(20, name=HOSTILE).decode()
    assert HOSTILE not in page
    assert "<img" not in page.partition("<script>")[0]
    assert html.escape("<img src=x onerror=alert(1)>") in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(scripts) == 3
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    allowed = " ".join(f"'sha256-{one}'" for one in digests)
    assert f"script-src {allowed};" in policy
    hrefs = re.findall(r"""\bhref=["']?([^"' >]*)""", page.partition("<script>")[0])
    assert all(one.startswith(("data:", "#")) for one in hrefs)


def test_a_thousand_entries_fit_into_five_megabytes() -> None:
    assert len(sample_page(1000)) < 5_000_000


def test_states_say_how_far_a_run_is() -> None:
    found: dict[str, Any] = {line.row.state: line for line in lines(10)}
    assert found["running"].state == "running, 5 of 28 parts"
    assert found["gate failed"].used == "151%, divergence"
