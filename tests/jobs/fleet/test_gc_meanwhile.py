"""What is published, begun or still at work while `gc` sweeps a catalog loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.gc
from pipeline.run import lease
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog

Meanwhile = Callable[[Callable[[], object]], None]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[TinyCatalog]:
    with tiny_catalog(tmp_path) as made:
        made.add("alpha", ["int8"])
        yield made


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Something happens just before `gc` takes the first run's lease."""
    acquire = lease.acquire

    def after(work: Callable[[], object]) -> None:
        def late(store: ObjectStore, **options: Any) -> lease.Lease:
            monkeypatch.setattr(jobs.gc.lease, "acquire", acquire)
            work()
            return acquire(store, **options)

        monkeypatch.setattr(jobs.gc.lease, "acquire", late)

    return after


def files(catalog: TinyCatalog) -> dict[str, bytes]:
    return {key: catalog.root.get(key) for key in catalog.root.list()}


def become(catalog: TinyCatalog, wanted: dict[str, bytes]) -> None:
    """Give everything below the root the content that it had at another time."""
    for key in catalog.root.list():
        if key not in wanted:
            catalog.root.delete(key)
    for key, data in wanted.items():
        catalog.root.put(key, data)


def test_exports_that_are_published_meanwhile_stay(
    catalog: TinyCatalog, meanwhile: Meanwhile
) -> None:
    catalog.nightly()
    run_id = catalog.current("alpha", "int8")["release"]["run_id"]
    catalog.root.put(f"runs/{run_id}/quarantine/old", b"damaged")  # something to delete
    before = files(catalog)
    catalog.values["models"][0]["export"] = ["dense"]
    catalog.nightly()
    later = files(catalog)
    become(catalog, before)
    meanwhile(lambda: become(catalog, later))
    code, _ = catalog.call("gc", catalog.root.root_url, "--delete")
    assert code == 0
    [export] = catalog.current("alpha", "int8")["release"]["exports"]
    assert catalog.root.exists(f"{export['folder']}/export.json")
    assert not catalog.root.list(f"runs/{run_id}/quarantine/")
    assert catalog.nightly()[1]["alpha int8"]["result"] == "up to date"


@pytest.mark.parametrize("is_finished", [False, True], ids=["leases alone", "finished"])
def test_a_run_that_is_published_meanwhile_stays(
    catalog: TinyCatalog, meanwhile: Meanwhile, is_finished: bool
) -> None:
    catalog.nightly()
    run_id = catalog.current("alpha", "int8")["release"]["run_id"]
    later = files(catalog)
    for key in later:
        of_run = key.startswith(f"runs/{run_id}/")
        if key.startswith("models/") or (
            of_run and not is_finished and not key.startswith(f"runs/{run_id}/{lease.PREFIX}")
        ):
            catalog.root.delete(key)
    meanwhile(lambda: become(catalog, later))
    options = ["--delete", *(["--unpublished"] if is_finished else [])]
    code, [one] = catalog.call("gc", catalog.root.root_url, *options)
    assert code == 0
    assert one["skipped"]
    assert catalog.current("alpha", "int8")["release"]["run_id"] == run_id
    assert catalog.nightly()[1]["alpha int8"]["result"] == "up to date"


def test_a_run_that_begins_meanwhile_keeps_what_it_has_committed(
    catalog: TinyCatalog, meanwhile: Meanwhile
) -> None:
    other = open_store(catalog.root.url("runs/beta-int8-0123456789ab"))
    catalog.nightly()
    lease.acquire(other).release()
    meanwhile(lambda: other.put("records/00000.json", b"{}"))
    code, swept = catalog.call("gc", catalog.root.root_url, "--delete")
    assert code == 0
    assert [s for one in swept if (s := one["skipped"])] == ["a run has begun here meanwhile"]
    assert other.exists("records/00000.json")


@pytest.mark.exhaustive
def test_statistics_of_a_run_at_work_stay_though_it_was_never_published(
    catalog: TinyCatalog,
) -> None:
    recipe = catalog.gptq()
    recipe["calibration"]["statistics"] = "float"
    catalog.values["models"][0]["recipes"] = [recipe]
    catalog.nightly()
    run_id = catalog.current("alpha", "gptq-w4")["release"]["run_id"]
    for key in catalog.root.list("models/"):
        catalog.root.delete(key)
    statistics = catalog.root.list("statistics/")
    assert statistics
    options = catalog.root.root_url, "--unpublished", "--delete", "--lease-seconds", 1
    with lease.acquire(open_store(catalog.root.url(f"runs/{run_id}")), seconds=1.0):
        assert catalog.call("gc", *options)[0] == 0
    assert set(statistics) <= set(catalog.root.list("statistics/"))
    assert catalog.call("gc", *options)[0] == 0
    assert catalog.root.list("runs/") == catalog.root.list("statistics/") == ()
