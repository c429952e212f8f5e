"""A catalog's recipe that names a size: made of runs of its own, judged, published, left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.composition.decision import Decision
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog

BLOCKS = 2
BITS = 8.9


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[TinyCatalog]:
    with tiny_catalog(tmp_path) as made:
        yield made


def auto(catalog: TinyCatalog, bits: float = BITS, **more: Any) -> dict[str, Any]:
    scheme = {"mode": "auto", "target_bits": bits, "choices": [2, 4], "measure_windows": 2}
    return catalog.gptq() | {"name": "within", "scheme": scheme | {"group_size": 16}} | more


JUDGED: dict[str, Any] = {
    "evaluate_on": ["texts/other.txt"],
    "windows": 2,
    "gate": {"max_divergence": 50},
}


@pytest.mark.exhaustive
def test_it_is_captured_once_judged_published_and_left_alone(catalog: TinyCatalog) -> None:
    catalog.add("alpha", [auto(catalog)], **JUDGED)
    code, found = catalog.nightly("--dry-run", "--on", "1xcpu16")
    assert code == 0, catalog.err
    assert list(found) == ["alpha within"]
    foreseen = found["alpha within"]["cost"]
    # Every width is solved, and the float model captured.
    stages = {stage["name"]: stage["seconds"] for stage in foreseen["stages"]}
    assert min(stages[name] for name in ("solve", "statistics", "evaluate")) > 0
    code, found = catalog.nightly()
    assert code == 0, catalog.err
    assert {name: one["result"] for name, one in found.items()} == {"alpha within": "published"}
    assert catalog.work.calls["commit_sums"] == BLOCKS
    release = catalog.current("alpha", "within")["release"]
    run = open_store(f"{catalog.root.root_url}/runs/{release['run_id']}")
    assert set(Decision.read(run, Decision.key).picked) == {0, 1}
    assert read_plan(run).recipe.name == "within"
    calls = dict(catalog.work.calls)
    assert {one["result"] for one in catalog.nightly()[1].values()} == {"up to date"}
    assert catalog.work.calls == calls
    # The widths' runs are nobody's release: they go when a person says so, the result stays.
    code, swept = catalog.call("gc", catalog.root.root_url, "--delete")
    assert code == 0
    assert not any(one["garbage"] and "within-w" in one["url"] for one in swept)
    code, swept = catalog.call("gc", catalog.root.root_url, "--unpublished", "--delete")
    assert sum("within-w" in one["url"] and one["deleted"] for one in swept) == 2
    assert catalog.call("verify", run.root_url)[0] == 0
    assert {one["result"] for one in catalog.nightly()[1].values()} == {"up to date"}


def test_a_target_out_of_reach_is_refused_before_anything_is_captured(
    catalog: TinyCatalog,
) -> None:
    catalog.add("alpha", [auto(catalog, 2.5)], **JUDGED)
    code, found = catalog.nightly()
    assert code == 2
    assert "target_bits 2.5: the smallest blocks" in found["alpha within"]["text"]
    assert not catalog.work.calls
    assert not [key for key in catalog.root.list() if key.endswith("plan.json")]


def test_what_it_cannot_be_is_told_with_its_line(catalog: TinyCatalog) -> None:
    catalog.add("alpha", [auto(catalog)], export="gptq")
    assert catalog.call("catalog", "check", catalog.file)[0] == 2
    assert "have several, those of mode: auto too" in catalog.err
    catalog.values["models"][0] = catalog.values["models"][0] | {
        "export": "dense",
        "recipes": [auto(catalog), catalog.gptq(name="within")],
    }
    assert catalog.call("catalog", "check", catalog.file)[0] == 2
    assert "alpha has two recipes named within" in catalog.err
