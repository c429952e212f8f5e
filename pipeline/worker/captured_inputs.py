"""What the layers of a group are given, micro-batch by micro-batch.

Each is the input that they will have in the quantized model: of layers that are quantized before
them, those of their own block too. Where they are solved for their outputs in the float model, it
comes with the input that they have there, of float layers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array
from numpy.typing import NDArray

from pipeline.model.blocks import Call
from pipeline.worker.block_program import BlockProgram
from pipeline.worker.shards import MicroBatch


class Captured(NamedTuple):
    """A micro-batch of a group's input.

    Attributes:
        inputs: as Keras gives it, [batch, sequence, …].
        mask: [batch, sequence]; rows where it is false are left out.
        in_float: the same input in the float model, if its drift is to be summed.
        held_back: it goes into a sum of its own.
    """

    inputs: Array
    mask: NDArray[np.bool_]
    in_float: Array | None = None
    held_back: bool = False


def captured(
    batches: Iterable[MicroBatch],
    call: Call,
    program: BlockProgram,
    stage: int,
    weights: Sequence[Array],
    in_float: Sequence[Array] | None,
) -> Iterator[Captured]:
    """Run micro-batches up to a stage, in the float model too if its weights are given.

    Args:
        weights: of the whole block, quantized up to this stage.
        in_float: of the float block.
    """
    for batch in batches:
        results = batch.run_stage(call, program, stage, weights)
        exact: Sequence[Array | None] = [None] * len(results)
        if in_float is not None and batch.in_float is not None:
            exact = batch.in_float.run_stage(call, program, stage, in_float)
        shapes = program.group_shapes[stage]
        for result, other, shape in zip(results, exact, shapes, strict=True):
            held_back = other is not None and batch.held_back
            yield Captured(result, batch.batch.rows(shape), other, held_back)


def captured_of_experts(
    batches: Iterable[MicroBatch],
    call: Call,
    program: BlockProgram,
    stage: int,
    weights: Sequence[Array],
) -> Iterator[tuple[Array, Array, NDArray[np.bool_]]]:
    """The inputs that experts have of their own, the router's choice, and which rows are tokens."""
    [shape] = program.group_shapes[stage]
    for batch in batches:
        inputs, choice = batch.run_stage(call, program, stage, weights)
        yield inputs, choice, batch.batch.rows(shape)
