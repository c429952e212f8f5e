"""Batches hold every row once, no longer than the model reads."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.evaluation.batches import EvaluationSet
from tests.pipeline.evaluation.test_answers import rows


def test_rows_are_padded_no_further_than_the_model_reads() -> None:
    lengths = [3, 34, 41, 49, 20, 3, 3, 3, 3]
    texts = tuple(np.arange(length, dtype=np.int32) for length in lengths)
    task = dataclasses.replace(rows(), rows=texts, most=48)
    given = EvaluationSet(tasks=(task,))
    assert [batch.length for batch in given.batches] == [32, 48]
    assert sorted(row for batch in given.batches for row in batch.rows) == list(range(9))
    # The last token of each is predicted, and not read.
    assert given.windows_of(given.batches[1]).tokens.shape == (3, 48)
    assert given.windows_of(given.batches[1]).lengths.tolist() == [33, 40, 48]
    short = dataclasses.replace(task, rows=(texts[0],) * 9, most=16)
    assert {batch.length for batch in EvaluationSet(tasks=(short,)).batches} == {16}
