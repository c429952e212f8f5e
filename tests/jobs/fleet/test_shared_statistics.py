"""Recipes of a catalog share statistics of the float model: captured once, mended, swept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.catalog.request import run_store
from pipeline.float_statistics import STATISTICS_FOLDER
from pipeline.run.events import read_totals
from pipeline.run.sums_records import SUMS_PREFIX
from tests.jobs.fleet.test_forecast import touch
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog

BLOCKS = 2
AWQ = {"mode": "awq", "group_size": 32, "clip_search": False}


def in_float(catalog: TinyCatalog, name: str = "all", **more: Any) -> dict[str, Any]:
    recipe = catalog.gptq()
    recipe["calibration"]["statistics"] = "float"
    recipe["scheme"]["scale_search"] = False  # which takes long to compile
    return recipe | {"name": name, **more}


def without(pattern: str, scheme: dict[str, Any] | None) -> dict[str, Any]:
    """A recipe with another scheme for some layers; their sums are stored nevertheless."""
    return {"rules": [{"pattern": pattern, "scheme": scheme}]}


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[TinyCatalog]:
    with tiny_catalog(tmp_path) as made:
        awq = in_float(made, "awq", scheme=AWQ)
        mixed = in_float(made, "mixed", **without("feedforward", {"mode": "int8"}))
        made.add("alpha", [mixed, in_float(made), awq])
        yield made


def sums(catalog: TinyCatalog) -> list[str]:
    keys = catalog.root.list(f"{STATISTICS_FOLDER}/")
    return [key for key in keys if key.split("/")[2:3] == [SUMS_PREFIX.rstrip("/")]]


def test_three_recipes_capture_once_and_are_foreseen_to(catalog: TinyCatalog) -> None:
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert [one["result"] for one in found.values()] == ["published"] * 3
    assert len({one["run_id"] for one in found.values()}) == 3
    assert catalog.work.calls["commit_sums"] == BLOCKS
    groups = catalog.work.calls["capture"] / BLOCKS
    assert groups == 4  # query, key and value; output; gate and up; down: a single shard each
    assert catalog.work.calls["quantize_alone"] == 3 * (BLOCKS + 1)
    assert not catalog.work.calls["solve"]
    assert len(sums(catalog)) == BLOCKS
    for run, expected in zip(found.values(), (True, False, False), strict=True):
        totals = read_totals(run_store(catalog.root, run["run_id"]))
        assert totals is not None
        assert totals.is_whole
        assert (totals.captured_seconds > 0) is expected

    # What each took is foreseen, though another captured for it; the first captures again, for all.
    touch(catalog, "alpha")
    code, foreseen = catalog.nightly("--dry-run")
    assert code == 0, catalog.err
    for number, one in enumerate(foreseen.values()):
        assert one["cost"]["corrected_by"] == 1
        [run_id] = {
            key.split("/")[1]
            for key in catalog.root.list("runs/")
            if key.startswith(f"runs/alpha-{one['recipe']}-")
        }
        totals = read_totals(run_store(catalog.root, run_id))
        assert totals is not None
        timed = sum(
            stage["seconds"]
            for stage in one["cost"]["stages"]
            if stage["name"] not in ("start", "plan", "evaluate")
        )
        assert timed == pytest.approx(totals.seconds) if number else timed > totals.seconds

    # Damaged at rest: found when the next recipe reads it, said, and that block made again.
    before = {key: catalog.root.get(key) for key in sums(catalog)}
    last = sums(catalog)[-1]
    catalog.root.put(last, before[last][:-1] + bytes([before[last][-1] ^ 1]))
    fourth = in_float(catalog, "fourth", **without("query", None))
    catalog.values["models"][0]["recipes"].append(fourth)
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert found["alpha fourth"]["result"] == "published"
    assert catalog.work.calls["commit_sums"] == BLOCKS + 1
    assert {key: catalog.root.get(key) for key in sums(catalog)} == before
    told = " ".join(catalog.err.split())
    assert "statistics cannot be used" in told
    assert f"made again: {catalog.root.url(last)} is damaged" in told


@pytest.mark.exhaustive
def test_statistics_go_with_the_last_run_that_uses_them(catalog: TinyCatalog) -> None:
    catalog.values["models"][0]["recipes"] = [in_float(catalog)]
    assert catalog.nightly()[0] == 0
    root = catalog.root.root_url
    code, swept = catalog.call("gc", root, "--delete")
    assert code == 0
    assert len(sums(catalog)) == BLOCKS
    # The same, of runs that are not finished alone.
    code, swept = catalog.call("gc", root, "--statistics")
    [listed] = [one for one in swept if f"/{STATISTICS_FOLDER}/" in one["url"]]
    assert {one["reason"] for one in listed["garbage"]} == {
        "statistics that no unfinished run uses"
    }
    assert len(sums(catalog)) == BLOCKS
    code, swept = catalog.call("gc", root, "--statistics", "--delete")
    assert code == 0
    assert catalog.root.list(f"{STATISTICS_FOLDER}/") == ()
    # Nothing else there is taken for statistics.
    mine = f"{STATISTICS_FOLDER}/mine/table.csv"
    catalog.root.put(mine, b"a,b")
    code, swept = catalog.call("gc", root, "--statistics", "--delete")
    assert code == 0
    assert not any("mine" in one["url"] for one in swept)
    assert catalog.root.list(f"{STATISTICS_FOLDER}/") == (mine,)
    catalog.root.delete(mine)
    # What another recipe needs is captured again.
    catalog.values["models"][0]["recipes"].append(
        in_float(catalog, "other", **without("query", None))
    )
    assert catalog.nightly()[0] == 0
    assert catalog.work.calls["commit_sums"] == 2 * BLOCKS
    # With its runs gone nothing uses it.
    for key in catalog.root.list("runs/"):
        catalog.root.delete(key)
    code, swept = catalog.call("gc", root, "--delete")
    assert code == 0
    assert catalog.root.list(f"{STATISTICS_FOLDER}/") == ()


@pytest.mark.exhaustive
def test_a_dry_run_counts_the_capture_once(catalog: TinyCatalog) -> None:
    code, found = catalog.nightly("--dry-run", "--on", "2xcpu16")
    assert code == 0, catalog.err
    forward = [
        next(s["seconds"] for s in one["cost"]["stages"] if s["name"] == "forward")
        for one in found.values()
    ]
    assert forward[0] > 0
    assert forward[1:] == [0, 0]
    # Nor is it counted where an earlier run has made them.
    recipes = catalog.values["models"][0]["recipes"]
    catalog.values["models"][0]["recipes"] = recipes[:1]
    assert catalog.nightly()[0] == 0
    catalog.values["models"][0]["recipes"] = recipes
    _, found = catalog.nightly("--dry-run", "--on", "2xcpu16")
    costs = [one["cost"] for one in found.values() if one["result"] == "to do"]
    assert [s["seconds"] for c in costs for s in c["stages"] if s["name"] == "forward"] == [0, 0]
