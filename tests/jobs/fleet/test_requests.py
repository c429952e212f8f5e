"""What a catalog's decisions, status and sweep ask of a store: by pages, and of nothing else."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from jobs.catalog.catalog_file import Catalog, parse_catalog
from jobs.catalog.catalog_runs import catalog_runs
from jobs.cli.main import main
from jobs.fleet.fleet_report import fleet_report
from jobs.fleet.nightly import Survey
from jobs.fleet.staleness import decide
from jobs.fleet.status import status
from pipeline.plan import PLAN_KEY
from pipeline.storage.object_store import ObjectStore, open_store
from tests.benchmarks.paged_store import Bucket, BucketBackend, PagedStore, serve
from tests.jobs.fleet.large_catalog import catalog_text, finish, write_sources
from tests.s3 import environment

NUMBER = 60
URL = "s3://fleet/team"


@pytest.fixture(scope="module")
def fleet() -> Iterator[tuple[PagedStore, Catalog]]:
    """A catalog of which all but two models are published, beside much that is none of its own."""
    bucket = Bucket()
    with serve(bucket) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        here = ObjectStore(URL, BucketBackend(bucket, "team"))
        root = ObjectStore(f"{URL}/fleet", BucketBackend(bucket, "team/fleet"))
        write_sources(URL, NUMBER, here)
        catalog = parse_catalog(catalog_text(URL, NUMBER), where="catalog.yaml", folder=None)
        for run in list(catalog_runs(catalog))[2:]:
            assert run.request is not None
            more = {f"records/{i}.json": b"{}" for i in range(10)}
            finish(root, run.request, {PLAN_KEY: b"no plan", **more})
        for i in range(2000):
            for folder in ("team/other", "team/presets/a", "team/presets/z", "team/fleet/runs/z"):
                bucket.put(f"{folder}/{i}", b"")
        yield server, catalog


def asked(server: PagedStore, work: Callable[[], object]) -> Counter[str]:
    server.requests.clear()
    work()
    return Counter(server.requests)


def test_decisions_list_by_pages_and_read_two_small_files_each(
    fleet: tuple[PagedStore, Catalog],
) -> None:
    server, catalog = fleet
    root = open_store(catalog.root_url)
    decided = []
    found = asked(server, lambda: decided.extend(decide(root, catalog, save_verified=True)))
    assert Counter(one.state for one in decided) == {"fresh": NUMBER - 2, "stale": 2}
    # Sources have two files each, and runs eighteen: a page or two hold them all.
    assert found["list"] <= 4
    # Which release is current and which of its files were verified; no verdict on what is new.
    assert found["get"] == 2 * NUMBER
    assert found.keys() <= {"list", "get"}


def test_a_source_that_several_models_name_is_looked_at_once(
    fleet: tuple[PagedStore, Catalog],
) -> None:
    server, _ = fleet
    models = "".join(f"  - {{name: n{i}, preset: {URL}/presets/m0000}}\n" for i in range(50))
    text = f"root: {URL}/elsewhere\ndefaults: {{recipes: [int8, int4]}}\nmodels:\n{models}"
    catalog = parse_catalog(text, where="catalog.yaml", folder=None)
    runs = []
    found = asked(server, lambda: runs.extend(catalog_runs(catalog)))
    assert len(runs) == 100
    assert found == {"list": 1}


def test_status_reads_what_is_current_and_lists_no_run(fleet: tuple[PagedStore, Catalog]) -> None:
    server, catalog = fleet
    root = open_store(catalog.root_url)
    rows = []
    found = asked(server, lambda: rows.extend(status(root, catalog)))
    assert Counter(row.state for row in rows) == {"published": NUMBER - 2, "not started": 2}
    assert found == {"list": 2, "get": NUMBER - 2}


def test_gc_lists_by_pages_and_looks_at_nothing_beside_the_catalog(
    fleet: tuple[PagedStore, Catalog], capsys: pytest.CaptureFixture[str]
) -> None:
    server, catalog = fleet

    def sweep() -> None:
        with pytest.raises(SystemExit) as ended:
            main(["gc", catalog.root_url, "--json"])
        assert ended.value.code == 0

    found = asked(server, sweep)
    swept = json.loads(capsys.readouterr().out)
    assert len(swept) == NUMBER - 2
    assert all("plan.json is damaged" in one["skipped"] for one in swept)
    # Whether the store answers, and what lies there; releases: a page or two of all. Runs: four of
    # names, among them what is no run, and two of the runs' own files.
    assert found["list"] <= 4 + 2 + 4 + 2
    assert found["head"] == 1  # by which the store answers


def test_the_fleet_s_page_lists_the_runs_that_it_shows(
    fleet: tuple[PagedStore, Catalog],
) -> None:
    server, catalog = fleet
    root = open_store(catalog.root_url)
    found = asked(server, lambda: fleet_report(root, catalog, to_root="../"))
    # Nights, requests, what is published, twice; and a page or two of runs.
    assert found["list"] <= 4 + 2
    assert found["get"] == NUMBER - 2


def test_memory_does_not_grow_with_what_was_decided_before(
    fleet: tuple[PagedStore, Catalog],
) -> None:
    _, catalog = fleet
    decisions = decide(open_store(catalog.root_url), catalog, save_verified=False)
    assert iter(decisions) is decisions  # one after another, not all at once
    assert os.environ["AWS_ENDPOINT_URL"]
    assert next(decisions).state == "stale"


def kept_bytes(make: Callable[[], object]) -> int:
    """How much memory what is made gives back."""
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        del made
        gc.collect()
        return held - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_a_catalog_s_entries_share_what_they_have_in_common() -> None:
    number = 400
    text = catalog_text(URL, number)
    settings = "{recipes: [gptq-w4-g128], calibration: {texts: [/t]}, evaluate_on: [/e]}"
    text = text.replace("{recipes: [int8]}", settings)
    found = kept_bytes(lambda: parse_catalog(text, where="catalog.yaml", folder=None))
    assert found / number < 700


def test_little_is_kept_of_each_entry_that_is_decided(fleet: tuple[PagedStore, Catalog]) -> None:
    _, catalog = fleet
    root = open_store(catalog.root_url)

    def survey(of: Catalog) -> Survey:
        return Survey.of(decide(root, of, save_verified=False))

    assert kept_bytes(lambda: survey(catalog)) / NUMBER < 1500
    # Of a run that is to be made all that its request says.
    text = catalog_text(URL, NUMBER).replace("int8", "int4")
    changed = parse_catalog(text, where="catalog.yaml", folder=None)
    assert len(survey(changed).stale) == NUMBER
    assert kept_bytes(lambda: survey(changed)) / NUMBER < 4000


def test_status_keeps_a_row_for_each_entry_and_no_more(fleet: tuple[PagedStore, Catalog]) -> None:
    _, catalog = fleet
    root = open_store(catalog.root_url)
    assert kept_bytes(lambda: status(root, catalog)) / NUMBER < 1500
