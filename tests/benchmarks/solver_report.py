"""The solver's timings as tables, and how they stand against the goals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
from rich.console import Console
from rich.table import Table

_VARIANTS = ("plain", "best")
_BASELINES = ("NumPy loop", "Keras (jax)", "Keras (numpy)")
_KERAS_GOAL = 100.0
_STEADY = 0.8


class TimingLike(Protocol):
    """What the report reads of `tests.benchmarks.solver.Timing`."""

    num_inputs: int
    num_outputs: int
    first: dict[str, float]
    phases: dict[str, float]
    skipped: dict[str, str]

    @property
    def rates(self) -> list[float]: ...

    @property
    def limit(self) -> float: ...

    def median(self, name: str) -> float | None: ...


def print_report(console: Console, timings: Sequence[TimingLike]) -> None:
    """Print the two tables and one line per goal."""
    device = jax.devices()[0]
    rates = [rate / 1e9 for each in timings for rate in each.rates]
    console.print(
        f"device: {device.device_kind} ({device.platform}), {os.cpu_count()} cores; "
        f"float32 matrix product: {max(rates):,.0f} Gflop/s"
    )
    if min(rates) < _STEADY * max(rates):
        console.print(
            f"[yellow]The machine was busy: that rate fell to {min(rates):,.0f} Gflop/s in some "
            "rounds, so the ratios below are rough.[/yellow]"
        )
    console.print(_comparison(timings))
    console.print(_phases(timings))
    for line in goals(timings):
        console.print(line)


def _comparison(timings: Sequence[TimingLike]) -> Table:
    table = Table(
        title="seconds after compilation, medians (plain: min-max grid in order; "
        "best: scale search and activation order)"
    )
    table.add_column("in × out")
    for name in ("limit", "plain", "× limit", "best", "× limit", *_BASELINES):
        table.add_column(name, justify="right")
    for each in timings:
        cells = [f"{each.num_inputs}×{each.num_outputs}", _seconds(each.limit)]
        for variant in _VARIANTS:
            median = each.median(variant)
            assert median is not None
            cells += [_seconds(median), f"{median / each.limit:.1f}"]
        for name in _BASELINES:
            median = each.median(name)
            cells.append(each.skipped.get(name, "–") if median is None else _seconds(median))
        table.add_row(*cells)
    return table


def _phases(timings: Sequence[TimingLike]) -> Table:
    table = Table(title="first calls (with compilation), and where the best variant's time goes")
    table.add_column("in × out")
    firsts = (*_VARIANTS, *_BASELINES[1:])
    for name in firsts:
        table.add_column(f"first: {name}", justify="right")
    for name in timings[0].phases:
        table.add_column(name, justify="right")
    for each in timings:
        cells = [_seconds(each.first[name]) if name in each.first else "–" for name in firsts]
        cells += [_seconds(seconds) for seconds in each.phases.values()]
        table.add_row(f"{each.num_inputs}×{each.num_outputs}", *cells)
    return table


def goals(timings: Sequence[TimingLike]) -> Iterator[str]:
    """Yield a line for each goal that one of these sizes can answer."""
    for each in timings:
        size = f"{each.num_inputs}×{each.num_outputs}"
        smallest = min(each.num_inputs, each.num_outputs)
        goal = 3.0 if smallest >= 4096 else 5.0 if smallest == 2048 else None
        for variant in _VARIANTS:
            median = each.median(variant)
            if goal is not None and median is not None:
                ratio = median / each.limit
                yield (
                    f"{_verdict(ratio <= goal)}  {size} {variant}: {ratio:.1f}× the limit, "
                    f"goal ≤ {goal:g}×"
                )
            if size != "512×512" or median is None:
                continue
            for name in _BASELINES[1:]:
                keras = each.median(name)
                if keras is not None:
                    ratio = keras / median
                    yield (
                        f"{_verdict(ratio >= _KERAS_GOAL)}  {size} {variant}: {ratio:.0f}× faster "
                        f"than {name}, goal ≥ {_KERAS_GOAL:g}×"
                    )


def _verdict(met: bool) -> str:
    return "[green]pass       [/green]" if met else "[red]falls short[/red]"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.2f}"
