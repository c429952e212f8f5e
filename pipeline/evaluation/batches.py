"""What source and result both read, cut into batches.

A batch has the same rows whoever computes it, since a product's rounding may depend on its shape:
whole batches are shared out, and the figures are the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation.choices import TaskRows

TOKENS_PER_PASS = 1 << 15
"""What a worker holds activations of, at most; more pass the blocks in turn."""
_TOKENS_PER_BATCH = 1024
_SHORTEST = 32


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that pass a model together.

    Attributes:
        task: its number; None for windows of text.
        text_set: of windows, the name of their set; "" of those without one.
        rows: numbers among the task's rows, or among the windows.
        length: tokens of each, with padding.
    """

    task: int | None
    rows: tuple[int, ...]
    length: int
    text_set: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.rows) * self.length


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSet:
    """What a result is evaluated on.

    Attributes:
        windows: of text without a name; None for none.
        named: windows of text, by the name of their set.
    """

    windows: TokenWindows | None = None
    named: Mapping[str, TokenWindows] = field(default_factory=dict)
    tasks: tuple[TaskRows, ...] = ()

    @cached_property
    def text_sets(self) -> dict[str, TokenWindows]:
        """All windows of text, by the name of their set; those without one, under "", first."""
        unnamed = {} if self.windows is None else {"": self.windows}
        return unnamed | {name: self.named[name] for name in sorted(self.named)}

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """All rows: windows of each set in their order, then each task's choices by length.

        Lengths are rounded up to powers of two, since each is compiled for, but not beyond what
        the model reads: it may have no more positions.
        """
        found = []
        for name, windows in self.text_sets.items():
            num_windows, length = windows.tokens.shape
            found += _cut(None, range(num_windows), length, name)
        for number, task in enumerate(self.tasks):
            by_length: dict[int, list[int]] = {}
            for row, tokens in enumerate(task.rows):
                by_length.setdefault(_padded(len(tokens) - 1, task.most), []).append(row)
            for length, rows in sorted(by_length.items()):
                found += _cut(number, rows, length)
        return tuple(found)

    def windows_of(self, batch: Batch) -> TokenWindows:
        """What a batch's rows read: of a task, all tokens but the last, padded."""
        if batch.task is None:
            return self.text_sets[batch.text_set].chosen(batch.rows)
        rows = [self.tasks[batch.task].rows[row][:-1] for row in batch.rows]
        tokens = np.zeros((len(rows), batch.length), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        return TokenWindows(tokens=tokens, lengths=lengths, fingerprint="", num_documents=0)


def _padded(length: int, most: int) -> int:
    return min(most, max(_SHORTEST, 1 << (length - 1).bit_length()))


def _cut(task: int | None, rows: Sequence[int], length: int, text_set: str = "") -> list[Batch]:
    size = max(1, _TOKENS_PER_BATCH // max(1, length))
    return [
        Batch(task=task, rows=tuple(rows[a : a + size]), length=length, text_set=text_set)
        for a in range(0, len(rows), size)
    ]
