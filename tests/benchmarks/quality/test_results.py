"""A folder of results: found again by key, whatever happened to the process that wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.quality.results import METRICS, Judged, Results, digest
from tests.benchmarks.quality.tables import comparison, table


def judged(row: str, draw: int, *, version: str = "1", shift: float = 0.0) -> Judged:
    rng = np.random.default_rng(draw)
    values = {metric: (shift + rng.random(8)).tolist() for metric in METRICS}
    return Judged(
        key=digest({"row": row, "draw": draw, "version": version}),
        row=row,
        draw=draw,
        form="full",
        version=version,
        seconds={"quantizing": 7.0},
        machine="x86_64, 2 cores",
        values={"novels": values},
    )


def test_what_was_measured_is_there_for_the_next_process(tmp_path: Path) -> None:
    given = [judged("quantfleet 3", draw) for draw in (0, 1)]
    for each in given:
        Results(tmp_path).append(each)
    assert Results(tmp_path).read() == given
    assert Results(tmp_path).has(given[0].key)
    assert not Results(tmp_path).has(judged("quantfleet 3", 2).key)


def test_a_line_that_a_killed_process_left_unfinished_is_measured_again(tmp_path: Path) -> None:
    first, second = judged("quantfleet 3", 0), judged("quantfleet 3", 1)
    results = Results(tmp_path)
    results.append(first)
    results.append(second)
    file = tmp_path / "judged.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert not results.has(second.key)
    results.append(second)
    assert results.read() == [first, second]


def test_the_newest_version_of_a_row_counts(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for each in (judged("a 3", 0), judged("a 3", 1), judged("a 3", 0, version="2")):
        results.append(each)
    assert [each.version for each in results.of_row("a 3", "full").values()] == ["2"]


def test_tables_pair_rows_by_draw(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for each in (judged("a 3", 0), judged("a 3", 1), judged("b 3", 1, shift=0.25)):
        results.append(each)
    # The same windows and draw but for the shift: no error at all.
    assert "| `b 3` | 1 | +0.2500 ± 0.0000; +28.4% ± 0.0% |" in comparison(
        results, ["a 3", "b 3"], "full"
    )
    assert "| `a 3` | 2 |" in table(results, ["a 3", "b 3"], "full")
    with pytest.raises(ValueError, match="no results of the 4 blocks measure"):
        table(results, ["a 3"], "4 blocks")
