"""What a catalog's runs would take: from metadata alone, corrected by what they took before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import remote_planning
from pipeline.calibration import texts
from pipeline.run.events import read_events
from pipeline.storage.object_store import open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a plan is made for costs; reading a text fails."""
    calls: Counter[str] = Counter()
    plan: Callable[..., Any] = remote_planning.plan_for_costs

    def count(url: str, *rest: Any) -> Any:
        calls[url.rpartition("/")[2]] += 1
        return plan(url, *rest)

    def refuse(*_: Any) -> None:
        raise AssertionError("a text was opened")

    monkeypatch.setattr("jobs.fleet.catalog_plans.plan_for_costs", count)
    monkeypatch.setattr(texts, "open_given_file", refuse)
    return calls


def touch(catalog: TinyCatalog, name: str) -> None:
    path = catalog.folder / "presets" / name / "model.weights.h5"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def test_a_catalog_is_costed_without_texts_and_models_of_one_config_are_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8", catalog.gptq()])
        catalog.add("beta", [catalog.gptq()], resources={"workers": 2})
        code, found = catalog.nightly("--dry-run", "--on", "8xH100")
        assert (code, catalog.work.solves) == (0, 0)
        assert calls == {"alpha": 2}
        assert {one["cost"]["workers"] for one in found.values()} == {8}
        each = {name: one["cost"]["gpus_per_worker"] for name, one in found.items()}
        assert each == {"alpha int8": 1, "alpha gptq-w4": 8, "beta gptq-w4": 4}
        for one in found.values():
            assert 0 < one["forecast"]["stored_bytes"] < one["forecast"]["source_bytes"]
            assert one["cost"]["price"] > 0
            assert "corrected_by" not in one["cost"]
        assert catalog.root.list() == ()


def test_a_run_that_asks_for_more_than_is_named_is_refused(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8"], resources={"workers": 3})
        code, found = catalog.nightly("--dry-run", "--on", "2xcpu16")
        assert code == 2
        assert "asks for 3 workers" in found["alpha int8"]["text"]
        code, _ = catalog.call("submit", catalog.file, "--address", "http://x", "--dry-run")
        assert code == 2
        assert "name workers with --on" in catalog.err


def test_what_earlier_runs_took_corrects_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8"])
        assert catalog.nightly()[0] == 0
        touch(catalog, "alpha")
        monkeypatch.setattr("jobs.fleet.forecast.correction", lambda *_: None)
        [plain] = catalog.nightly("--dry-run")[1].values()
        monkeypatch.undo()
        monkeypatch.setattr("jobs.execute.open_compute", catalog.work.open_compute)
        [one] = catalog.nightly("--dry-run")[1].values()
        assert one["cost"]["corrected_by"] == 1
        # The plan is the same, and so are the workers: what is predicted is what it took.
        [run] = {key.split("/")[1] for key in catalog.root.list("runs/")}
        events = read_events(open_store(f"{catalog.root.root_url}/runs/{run}"))
        times = {event.name: event.time for event in events}
        measured = (times["sealed"] - times["started"]).total_seconds()
        timed = [
            stage["seconds"]
            for stage in one["cost"]["stages"]
            if stage["name"] not in ("start", "plan", "evaluate")
        ]
        assert sum(timed) == pytest.approx(measured)
        assert "corrected_by" not in plain["cost"]
        # Nothing is known of GPUs from a run on CPUs.
        [elsewhere] = catalog.nightly("--dry-run", "--on", "H100")[1].values()
        assert "corrected_by" not in elsewhere["cost"]
        assert json.dumps(one)


def test_a_submission_on_paper_is_scheduled_by_priority_and_workers(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        for name, more in (("alpha", {}), ("beta", {"priority": 5})):
            catalog.add(name, ["int8", "int4"], resources={"workers": 1}, **more)
        given = ["--address", "http://x", "--dry-run", "--on", "2xcpu16", "--at-once", 3]
        code, found = catalog.call("submit", catalog.file, *given)
        assert (code, catalog.work.solves) == (0, 0)
        schedule = found["schedule"]
        assert [one["name"].split()[0] for one in schedule["runs"]] == ["beta"] * 2 + ["alpha"] * 2
        assert [one["start"] > 0 for one in schedule["runs"]] == [False] * 2 + [True] * 2
        assert {one["after"].split()[0] for one in schedule["runs"][2:]} == {"beta"}
        seconds = sum(one["cost"]["seconds"] for one in found["runs"])
        assert schedule["seconds"] * 2 * schedule["utilisation"] == pytest.approx(seconds)
        _, failing = catalog.call("submit", catalog.file, *given, "--failing-every", 0.001)
        assert failing["schedule"]["failures"] > 0
        assert failing["schedule"]["seconds"] > schedule["seconds"]


def test_a_folder_without_weights_is_not_costed_as_its_neighbour(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", [catalog.gptq()])
        catalog.add("beta", [catalog.gptq()])
        (catalog.folder / "presets" / "beta" / "model.weights.h5").unlink()
        code, found = catalog.nightly("--dry-run", "--on", "8xH100")
    assert code == 2
    assert "cost" in found["alpha gptq-w4"]
    assert "cost" not in found["beta gptq-w4"]
