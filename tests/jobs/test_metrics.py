"""What a run tells Prometheus, under names that never change."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from functools import partial

import pytest

from jobs.logging import LOG
from jobs.metrics import COUNTERS, GAUGES, RunMetrics, pass_ended, tell_of_pass
from pipeline.executor import ray_cluster
from pipeline.fidelity import Fidelity, SetFidelity
from pipeline.run.events import Step
from pipeline.storage.object_store import open_store
from tests.pipeline.tiny_runs import NUM_BLOCKS, execute, planned


class Told:
    """Stands for all of Ray's metrics: what was added or set, by name and tags."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[str, ...], float] = defaultdict(float)
        monkeypatch.setattr(ray_cluster, "increase_counter", self._increase)
        monkeypatch.setattr(ray_cluster, "set_gauge", self._set)

    def _increase(self, name: str, description: str, amount: float, tags: dict[str, str]) -> None:
        assert (description, tuple(tags)) == COUNTERS[name]
        self.values[(name, *tags.values())] += amount

    def _set(self, name: str, description: str, value: float, tags: dict[str, str]) -> None:
        assert (description, tuple(tags)) == GAUGES[name]
        self.values[(name, *tags.values())] = value


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def test_a_run_counts_what_it_commits_and_loses(told: Told) -> None:
    store = open_store("memory://test-metrics")
    seen: list[Step] = []
    metrics = RunMetrics(model="llama", recipe="w4")
    execute(
        planned("gptq"),
        store,
        workers=2,
        report=metrics.also(seen.append, num_parts=NUM_BLOCKS + 1),
        lose=[("solve", 2)],
    )
    metrics.ended("finished")
    metrics.judged(Fidelity(num_windows=1, count=1, source_perplexity=20.0, result_perplexity=22.0))
    sizes = [step.record.size_bytes for step in seen if step.record is not None]
    assert told.values["quantfleet_blocks_total", "llama"] == NUM_BLOCKS + 1 == len(sizes)
    assert told.values["quantfleet_written_bytes_total", "llama"] == sum(sizes)
    assert told.values["quantfleet_lost_workers_total", "llama"] == 1
    assert told.values["quantfleet_runs_total", "llama", "w4", "finished"] == 1
    assert told.values["quantfleet_perplexity_ratio", "llama", "w4"] == pytest.approx(1.1)
    assert told.values["quantfleet_stage_seconds_total", "llama", "capture"] > 0
    assert told.values["quantfleet_last_block_timestamp_seconds", "llama"] > 1.7e9
    assert told.values["quantfleet_parts", "llama", "w4"] == NUM_BLOCKS + 1
    assert told.values["quantfleet_parts_left", "llama", "w4"] == 0


def test_parts_that_a_resumed_run_finds_are_not_left(told: Told) -> None:
    report = RunMetrics(model="llama", recipe="w4").also(lambda _: None, num_parts=30)
    report(Step(event="resumed", parts=(0, 1, 2)))
    report(Step(event="resumed", parts=(0, 1, 2, 3)))
    assert told.values["quantfleet_parts_left", "llama", "w4"] == 26
    assert told.values["quantfleet_parts", "llama", "w4"] == 30


@pytest.mark.parametrize("names", [("code", "novels"), ("novels", "code")])
def test_a_set_without_a_number_is_the_worst(told: Told, names: tuple[str, str]) -> None:
    of_set = partial(SetFidelity, num_windows=1, count=1, source_perplexity=20.0)
    sets = [
        of_set(name=name, result_perplexity=result)
        for name, result in zip(names, (22.0, math.nan), strict=True)
    ]
    RunMetrics(model="m", recipe="r").judged(Fidelity(num_windows=0, count=0, sets=tuple(sets)))
    assert math.isnan(told.values["quantfleet_perplexity_ratio", "m", "r"])


def test_a_nightly_pass_says_when_it_ended(told: Told) -> None:
    pass_ended("fleet", {"published": 3, "gate failed": 1, "failed": 0}, went_well=False)
    assert told.values["quantfleet_entries", "fleet", "gate failed"] == 1
    assert told.values["quantfleet_entries", "fleet", "failed"] == 0
    assert told.values["quantfleet_pass_timestamp_seconds", "fleet"] > 1.7e9
    assert ("quantfleet_nightly_timestamp_seconds", "fleet") not in told.values
    pass_ended("fleet", {}, went_well=True)
    assert told.values["quantfleet_nightly_timestamp_seconds", "fleet"] > 1.7e9


def test_a_pass_outlives_the_cluster_that_it_would_tell_of_itself(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    LOG.propagate = True
    tell_of_pass("127.0.0.1:1", "fleet", {"published": 3}, went_well=True)
    assert told.values == {}
    assert "no Ray cluster at 127.0.0.1:1" in caplog.text


def test_names_are_prometheus_own_and_counters_end_as_they_should() -> None:
    for name, (description, tags) in {**COUNTERS, **GAUGES}.items():
        assert re.fullmatch(r"quantfleet_[a-z_]+", name)
        assert (name in COUNTERS) == name.endswith("_total")
        assert description.endswith(".")
        assert all(re.fullmatch(r"[a-z]+", tag) for tag in tags)
