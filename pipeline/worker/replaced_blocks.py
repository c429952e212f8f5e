"""What a block of an artifact does to the source when it alone takes the place of its own.

The source's activations go to the block once; from there each artifact's go on through its block
and the rest of the source. They all pass a block together, so that each is read once.

Of some of a block's layers alone it is compared what the block gives, and no more: the source's own
block runs with their kernels decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity
from pipeline.model.inputs import InputLayout
from pipeline.worker.evaluate import compare_outputs, one_row
from pipeline.worker.layer_units import Units, compared_states, layer_units
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
        if not self._last:
            self._last = [dict(state) for state in entering]
            for number in range(first, len(calls)):
                self._source.advance(number, self._last)
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

    def units(self, block: int) -> Units:
        """Layers of a block that have to be of one run, if errors of what it gives tell them apart.

        Needs a batch.
        """
        calls = self._source.graph.calls
        first = next(number for number, call in enumerate(calls) if call.block == block)
        values = self._advanced_to(first)[0]
        shapes = {n: jax.ShapeDtypeStruct(one.shape, one.dtype) for n, one in values.items()}
        found = self._source.graph.blocks[block]
        return layer_units(found, calls[first], shapes, len(self._windows[0].lengths))

    def compare_layers(
        self, block: int, units: Units, kernels: Sequence[Callable[[], Mapping[str, Array]]]
    ) -> tuple[NDArray[np.float64], int]:
        """Put units of each run's layers in the place of the source's, one unit at a time.

        Args:
            kernels: for each run, what makes its layers' kernels, by path.

        Returns:
            [batches, runs, units], the sum over tokens of ‖y' - y‖² / ‖y‖², of all the block gives;
            and the number of tokens of all batches.
        """
        calls, graph = self._source.graph.calls, self._source.graph
        whole = self._source.block(block)
        variables = {target.path: target.kernel_path for target in graph.blocks[block].targets}
        errors = np.zeros((len(self._batches), len(kernels), len(units)))
        num_tokens = 0
        for number in (number for number, call in enumerate(calls) if call.block == block):
            entering = self._advanced_to(number)
            for some in self._passes():
                expected = [dict(entering[i]) for i in some]
                self._source.advance(number, expected, whole)
                rows = {
                    i: self._rows(i, given, calls[number].gives)
                    for i, given in zip(some, expected, strict=True)
                }
                num_tokens += sum(int(own.sum()) for of in rows.values() for own in of.values())
                for run, make in enumerate(kernels):
                    made = make()
                    for unit, layers in enumerate(units):
                        own = {variables[path]: made[path] for path in layers if path in made}
                        if not own:
                            continue  # they are in float
                        states = [dict(entering[i]) for i in some]
                        pairs = [(v, own.get(str(v.path), value)) for v, value in whole]
                        self._source.advance(number, states, pairs)
                        for i, found, exact in zip(some, states, expected, strict=True):
                            errors[i, run, unit] += sum(
                                _relative_error(found[n], exact[n], mask)
                                for n, mask in rows[i].items()
                            )
        return errors, num_tokens

    def _rows(
        self, index: int, values: BatchValues, gives: Sequence[int]
    ) -> dict[int, NDArray[np.bool_]]:
        """Which vectors of a batch are no padding, of each of the hidden states that a call gives.

        By the numbers of the values.
        """
        windows = self._windows[index]
        batch = self._layout.batch(windows, slice(None), len(windows.lengths))
        places = compared_states([values[n] for n in gives], len(windows.lengths))
        return {gives[i]: batch.rows(values[gives[i]].shape[:2]) for i in places}

    def _advanced_to(self, call: int) -> list[BatchValues]:
        """The source's values where they enter a call, for each batch."""
        if self._entering is None or call < self._call:
            batches = [
                self._layout.batch(windows, slice(None), len(windows.lengths))
                for windows in self._windows
            ]
            self._entering, self._call = self._source.embed(batches), 0
        while self._call < call:
            self._source.advance(self._call, self._entering)
            self._call += 1
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


def _relative_error(found: Array, expected: Array, rows: NDArray[np.bool_]) -> float:
    """Σ‖y' - y‖² / ‖y‖² over some vectors."""
    errors, sizes = (np.asarray(one, np.float64)[rows] for one in _squares(found, expected))
    return float(np.sum(np.divide(errors, sizes, out=np.zeros_like(errors), where=sizes > 0)))


@jax.jit
def _squares(found: Array, expected: Array) -> tuple[Array, Array]:
    exact = expected.astype(jnp.float32)
    return jnp.square(found.astype(jnp.float32) - exact).sum(-1), jnp.square(exact).sum(-1)


def by_artifact(
    found: Sequence[Sequence[list[list[WindowFidelity]]]], num_batches: int
) -> list[list[WindowFidelity]]:
    """What several devices found of every nth batch each, put in order for each artifact."""
    batches = [found[i % len(found)][i // len(found)] for i in range(num_batches)]
    return [[row for rows in of_one for row in rows] for of_one in zip(*batches, strict=True)]
