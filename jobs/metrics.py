"""What runs tell Prometheus, through Ray, which puts `ray_` before each name; names are stable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.fidelity import Fidelity
from pipeline.run.events import Report, Step

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quantfleet_runs_total": ("Runs that ended, by outcome.", ("model", "recipe", "outcome")),
    "quantfleet_blocks_total": ("Files of weights committed.", ("model",)),
    "quantfleet_stage_seconds_total": (
        "Seconds of work by stage, all workers together.",
        ("model", "stage"),
    ),
    "quantfleet_written_bytes_total": ("Bytes of weights committed.", ("model",)),
    "quantfleet_lost_workers_total": ("Workers that died at work.", ("model",)),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quantfleet_perplexity_ratio": (
        "Perplexity of the result over that of its source.",
        ("model", "recipe"),
    ),
    "quantfleet_last_block_timestamp_seconds": (
        "When a file of weights was last committed, seconds since 1970.",
        ("model",),
    ),
    "quantfleet_nightly_timestamp_seconds": (
        "When a nightly pass last ended well, seconds since 1970.",
        ("catalog",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The metrics of one run. Ray must be running in this process.

    Attributes:
        model: the model's name, as people call it.
        recipe: the recipe's name.
    """

    model: str
    recipe: str

    def also(self, report: Report) -> Report:
        """A report that goes here and there."""

        def both(step: Step) -> None:
            for stage, seconds in step.seconds.items():
                tags = {"model": self.model, "stage": stage}
                _counter("quantfleet_stage_seconds_total").inc(seconds, tags)
            if step.event == "lost":
                _counter("quantfleet_lost_workers_total").inc(1, {"model": self.model})
            if step.record is not None:
                tags = {"model": self.model}
                _counter("quantfleet_blocks_total").inc(1, tags)
                _counter("quantfleet_written_bytes_total").inc(step.record.size_bytes, tags)
                _gauge("quantfleet_last_block_timestamp_seconds").set(time.time(), tags)
            report(step)

        return both

    def ended(self, outcome: str) -> None:
        """Count the run: "finished", "failed" or "interrupted"."""
        tags = {"model": self.model, "recipe": self.recipe, "outcome": outcome}
        _counter("quantfleet_runs_total").inc(1, tags)

    def judged(self, fidelity: Fidelity) -> None:
        """Tell how good the result is."""
        if fidelity.result_perplexity is not None and fidelity.source_perplexity:
            ratio = fidelity.result_perplexity / fidelity.source_perplexity
            tags = {"model": self.model, "recipe": self.recipe}
            _gauge("quantfleet_perplexity_ratio").set(ratio, tags)


def nightly_ended(catalog: str) -> None:
    """Tell that a nightly pass of a catalog ended well."""
    _gauge("quantfleet_nightly_timestamp_seconds").set(time.time(), {"catalog": catalog})


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    description, tags = COUNTERS[name]
    return Counter(name, description=description, tag_keys=tags)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, tags = GAUGES[name]
    return Gauge(name, description=description, tag_keys=tags)
