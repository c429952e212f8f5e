"""What a block of an artifact does to the source when it alone takes the place of its own.

The source's activations go to the block once; from there each artifact's go on through its block
and the rest of the source. They all pass a block together, so that each is read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity
from pipeline.model.inputs import InputLayout
from pipeline.worker.evaluate import compare_outputs, one_row
from pipeline.worker.streamed_model import BatchValues, StreamedModel


class ReplacedBlocks:
    """Compares a source with itself but for one block, on some batches of windows.

    It keeps the source's activations where they enter the block that was compared last, and those
    that its blocks leave to the head.
    """

    def __init__(
        self,
        source: StreamedModel,
        artifacts: Sequence[StreamedModel],
        layout: InputLayout,
        given: EvaluationSet,
        numbers: Sequence[int],
        *,
        predicts_tokens: bool,
        tokens_per_pass: int,
    ) -> None:
        """Args: numbers: of the batches.

        predicts_tokens, tokens_per_pass: see `pipeline.worker.evaluate.evaluate`.
        """
        for artifact in artifacts:
            pairs = zip(source.graph.calls, artifact.graph.calls, strict=True)
            assert all(a.takes == b.takes and a.gives == b.gives for a, b in pairs)
        self._source, self._artifacts = source, artifacts
        self._layout, self._predicts_tokens = layout, predicts_tokens
        self._batches = [given.batches[number] for number in numbers]
        self._windows = [given.windows_of(batch) for batch in self._batches]
        self._tokens_per_pass = tokens_per_pass
        self._call = 0
        self._entering: list[BatchValues] | None = None
        self._last: list[BatchValues] = []

    def compare(self, block: int) -> list[list[list[WindowFidelity]]]:
        """Put each artifact's block in the place of the source's.

        Returns:
            For each batch, for each artifact, what was found of each row.
        """
        calls = self._source.graph.calls
        first = next(number for number, call in enumerate(calls) if call.block == block)
        entering = self._advanced_to(first)
        found: list[list[list[WindowFidelity]]] = []
        for some in self._passes():
            states = [[dict(entering[i]) for i in some] for _ in self._artifacts]
            for number in range(first, len(calls)):
                # Blocks that run several times are replaced each time.
                if calls[number].block == block:
                    for artifact, own in zip(self._artifacts, states, strict=True):
                        artifact.advance(number, own)
                else:
                    self._source.advance(number, [state for own in states for state in own])
            found += self._compared(some, states)
        return found

    def _advanced_to(self, call: int) -> list[BatchValues]:
        """The source's values where they enter a call, for each batch."""
        calls = self._source.graph.calls
        if self._entering is None or call < self._call:
            batches = [
                self._layout.batch(windows, slice(None), len(windows.lengths))
                for windows in self._windows
            ]
            self._entering, self._call = self._source.embed(batches), 0
        while self._call < call:
            self._source.advance(self._call, self._entering)
            self._call += 1
        if not self._last:
            self._last = [dict(state) for state in self._entering]
            for number in range(call, len(calls)):
                self._source.advance(number, self._last)
        return self._entering

    def _passes(self) -> Iterator[list[int]]:
        """Batches whose activations, of all artifacts, have room side by side."""
        some: list[int] = []
        tokens = 0
        for index, batch in enumerate(self._batches):
            needed = batch.num_tokens * len(self._artifacts)
            if some and tokens + needed > self._tokens_per_pass:
                yield some
                some, tokens = [], 0
            some.append(index)
            tokens += needed
        if some:
            yield some

    def _compared(
        self, batches: Sequence[int], states: Sequence[Sequence[BatchValues]]
    ) -> Iterator[list[list[WindowFidelity]]]:
        head = self._source.head()
        for place, index in enumerate(batches):
            found: list[list[WindowFidelity]] = [[] for _ in states]
            for row in range(len(self._windows[index].lengths)):
                window = self._layout.batch(self._windows[index], [row], 1)
                before = head(one_row(self._taken(self._last[index]), row), window)
                for own, rows in zip(states, found, strict=True):
                    after = head(one_row(self._taken(own[place]), row), window)
                    compared = compare_outputs(
                        before, after, window, predicts_tokens=self._predicts_tokens
                    )
                    # Of each token it would travel for nothing.
                    rows.append(dataclasses.replace(compared, divergences=np.zeros(0, np.float32)))
            yield found

    def _taken(self, state: BatchValues) -> BatchValues:
        return {number: state[number] for number in self._source.graph.head_takes}


def by_artifact(
    found: Sequence[Sequence[list[list[WindowFidelity]]]], num_batches: int
) -> list[list[WindowFidelity]]:
    """What several devices found of every nth batch each, put in order for each artifact."""
    batches = [found[i % len(found)][i // len(found)] for i in range(num_batches)]
    return [[row for rows in of_one for row in rows] for of_one in zip(*batches, strict=True)]
