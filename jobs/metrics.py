"""Metrics for Prometheus, exported by Ray, which puts `ray_` before each name; names are stable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jobs.logging import log_event
from pipeline.executor.protocol import ExecutorError
from pipeline.fidelity import Fidelity
from pipeline.run.events import Report, Step

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quantfleet_runs_total": ("Runs that ended, by outcome.", ("model", "recipe", "outcome")),
    "quantfleet_blocks_total": ("Files of weights committed.", ("model",)),
    "quantfleet_stage_seconds_total": ("Worker seconds by stage.", ("model", "stage")),
    "quantfleet_written_bytes_total": ("Bytes of weights committed.", ("model",)),
    "quantfleet_lost_workers_total": ("Workers that died at work.", ("model",)),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quantfleet_perplexity_ratio": (
        "Result's perplexity over its source's, of several sets of texts the worst.",
        ("model", "recipe"),
    ),
    "quantfleet_parts": ("Files of weights that a run makes.", ("model", "recipe")),
    "quantfleet_parts_left": ("Those that are not committed yet.", ("model", "recipe")),
    "quantfleet_entries": (
        "Entries of a catalog, by what became of them in the last pass.",
        ("catalog", "result"),
    ),
    "quantfleet_last_block_timestamp_seconds": ("Unix time of the last commit.", ("model",)),
    "quantfleet_pass_timestamp_seconds": ("Unix time of the last pass.", ("catalog",)),
    "quantfleet_nightly_timestamp_seconds": ("Unix time of the last good pass.", ("catalog",)),
}

Outcome = Literal["finished", "gate_failed", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The metrics of one run of a model and a recipe. Ray must be running in this process."""

    model: str
    recipe: str

    def also(self, report: Report, *, num_parts: int) -> Report:
        """A report function that counts each step before it passes it on to `report`.

        Args:
            num_parts: of the run.
        """
        done: set[int] = set()

        def tell_parts() -> None:
            tags = {"model": self.model, "recipe": self.recipe}
            _record("quantfleet_parts", num_parts, **tags)
            _record("quantfleet_parts_left", num_parts - len(done), **tags)

        def both(step: Step) -> None:
            if step.event == "resumed":
                done.update(step.parts)
                tell_parts()
            for stage, seconds in step.seconds.items():
                _record("quantfleet_stage_seconds_total", seconds, model=self.model, stage=stage)
            if step.event == "lost":
                _record("quantfleet_lost_workers_total", 1, model=self.model)
            if step.record is not None:
                size_bytes = step.record.size_bytes
                _record("quantfleet_blocks_total", 1, model=self.model)
                _record("quantfleet_written_bytes_total", size_bytes, model=self.model)
                done.add(step.record.part)
                tell_parts()
                _record("quantfleet_last_block_timestamp_seconds", time.time(), model=self.model)
            report(step)

        return both

    def ended(self, outcome: Outcome) -> None:
        """Count the run."""
        _record("quantfleet_runs_total", 1, model=self.model, recipe=self.recipe, outcome=outcome)

    def judged(self, fidelity: Fidelity) -> None:
        """Set the quality of the result."""
        found = [one.perplexity_ratio for one in fidelity.texts.values()]
        ratios = [ratio for ratio in found if ratio is not None]
        if ratios:
            # NaN, which compares with nothing, is worse than any number.
            worst = max(ratios, key=lambda ratio: (math.isnan(ratio), ratio))
            _record("quantfleet_perplexity_ratio", worst, model=self.model, recipe=self.recipe)


def tell_of_pass(
    address: str, catalog: str, entries: Mapping[str, int], *, went_well: bool
) -> None:
    """Tell a cluster's metrics how a pass over a catalog ended.

    Where the cluster is gone, that is said, and the pass ends as it would have.

    Args:
        entries: how many of them ended how, also where that is none.
    """
    # Nothing may import Ray before a run needs it.
    from pipeline.executor.ray_cluster import connect

    try:
        with connect(address):
            pass_ended(catalog, entries, went_well=went_well)
    except ExecutorError as problem:
        message = f"the cluster's metrics were not told how this pass ended: {problem}"
        log_event("not told", message, level=logging.WARNING)


def pass_ended(catalog: str, entries: Mapping[str, int], *, went_well: bool) -> None:
    """Set the metrics of a pass over a catalog that ends now. Ray must be running."""
    now = time.time()
    for result, number in entries.items():
        _record("quantfleet_entries", number, catalog=catalog, result=result)
    _record("quantfleet_pass_timestamp_seconds", now, catalog=catalog)
    if went_well:
        _record("quantfleet_nightly_timestamp_seconds", now, catalog=catalog)


def _record(name: str, value: float, **tags: str) -> None:
    # Nothing may import Ray before a run needs it.
    from pipeline.executor import ray_cluster

    if name in COUNTERS:
        ray_cluster.increase_counter(name, COUNTERS[name][0], value, tags)
    else:
        ray_cluster.set_gauge(name, GAUGES[name][0], value, tags)
