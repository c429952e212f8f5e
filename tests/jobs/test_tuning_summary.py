"""The summary of training counts the blocks that are better for it, and shows no NaN."""

from __future__ import annotations

import pytest

from jobs.tuning_summary import TuningSummary
from pipeline.run.records import TuningRecord


def record(solved: float | None, tuned: float | None) -> TuningRecord:
    better = solved is not None and tuned is not None and tuned < solved
    return TuningRecord(
        kept="tuned" if better else "solved",
        solved_error=solved,
        tuned_error=tuned,
        num_tokens=8,
        changed_codes=0.0,
        norms={},
    )


def test_errors_are_of_what_was_kept() -> None:
    found = TuningSummary.of([record(0.4, 0.2), record(0.2, 0.3), record(0.3, 0.1)])
    assert found is not None
    assert (found.num_blocks, found.num_kept) == (3, 2)
    assert found.solved_error == pytest.approx(0.3)
    assert found.error == pytest.approx((0.2 + 0.2 + 0.1) / 3)
    assert found.text.startswith("2 of 3 blocks are better for it")
    assert found.text.endswith("0.3000 → 0.1667")


def test_a_block_without_a_finite_error_leaves_no_mean() -> None:
    found = TuningSummary.of([record(0.4, 0.2), record(None, None)])
    assert found is not None
    assert found.text.endswith("not finite → not finite")
    assert TuningSummary.of([]) is None
