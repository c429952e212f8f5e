"""Tables of results, in Markdown."""

from __future__ import annotations

import math

from tests.benchmarks.quality.results import Judged, Results, values
from tests.benchmarks.quality.statistics import Estimate, estimate, paired_difference


def table(results: Results, rows: list[str], form: str) -> str:
    """Every row on every kind of text: perplexity; KL, its 99th percentile, flipped tokens.

    The error is that of the mean KL.
    """
    kinds = _kinds(results, form)
    lines = [_line(["row", "draws", *kinds, "seconds"]), _line(["---"] * (len(kinds) + 3))]
    floats = False
    for row in rows:
        judged = results.of_row(row, form)
        if not judged:
            continue
        if not floats:  # the same in every line
            floats = True
            nlls = [estimate(values(judged, [min(judged)], kind, "float_nll")) for kind in kinds]
            cells = [f"{math.exp(nll.mean):.2f}" for nll in nlls]
            lines.append(_line(["float", "", *cells, ""]))
        draws = sorted(judged)
        cells = []
        for kind in kinds:
            found = {
                metric: estimate(values(judged, draws, kind, metric))
                for metric in ("nll", "kl", "kl_p99", "flips")
            }
            cells.append(
                f"{math.exp(found['nll'].mean):.2f}; {_with_error(found['kl'])}, "
                f"{found['kl_p99'].mean:.2f}, {found['flips'].mean:.1%}"
            )
        lines.append(_line([f"`{row}`", str(len(draws)), *cells, _seconds(judged)]))
    return "\n".join(lines)


def comparison(results: Results, rows: list[str], form: str) -> str:
    """Each row less the first: KL in nats, and perplexity in percent, each with standard error."""
    first, *others = rows
    theirs = results.of_row(first, form)
    kinds = _kinds(results, form)
    lines = [
        _line([f"less `{first}`", "draws", *kinds]),
        _line(["---"] * (len(kinds) + 2)),
    ]
    for row in others:
        ours = results.of_row(row, form)
        draws = sorted(ours.keys() & theirs.keys())
        if not draws:
            lines.append(_line([f"`{row}`", "0", *("" for _ in kinds)]))
            continue
        cells = []
        for kind in kinds:
            nll, kl = (
                paired_difference(
                    values(ours, draws, kind, metric), values(theirs, draws, kind, metric)
                )
                for metric in ("nll", "kl")
            )
            ratio = math.exp(nll.mean)
            cells.append(
                f"{kl.mean:+.4f} ± {kl.error:.4f}; {ratio - 1:+.1%} ± {ratio * nll.error:.1%}"
            )
        lines.append(_line([f"`{row}`", str(len(draws)), *cells]))
    return "\n".join(lines)


def _kinds(results: Results, form: str) -> list[str]:
    kinds = [list(judged.values) for judged in results.read() if judged.form == form]
    if not kinds:
        raise ValueError(f"no results of the {form} measure yet")
    return kinds[-1]


def _with_error(found: Estimate) -> str:
    return f"{found.mean:.4f} ± {found.error:.4f}"


def _seconds(judged: dict[int, Judged]) -> str:
    seconds = sorted(
        each.seconds["quantizing"] for each in judged.values() if "quantizing" in each.seconds
    )
    return f"{seconds[len(seconds) // 2]:.0f}" if seconds else ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
