"""Train a solved block: `quantizer.tuning`, with what Keras and the plan say goes in and out.

All blocks of one signature share compiled programs. What is trained are the gptq layers of the
block, but for banks of experts, and the weights of its norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from numpy.typing import NDArray

from pipeline.model.blocks import Block, Call
from pipeline.model.targets import Target
from pipeline.plan import LayerPlan, Plan
from pipeline.recipe.recipe import Tuning
from pipeline.run.records import TuningRecord
from pipeline.run.solved_layers import SolvedLayer, TunedBlock
from pipeline.run.worker_api import Values
from pipeline.worker.block_program import BlockProgram, hidden_states, trace_block
from pipeline.worker.shards import MicroBatch
from quantizer.keras_format.layers import kernel_layout
from quantizer.keras_format.variables import encode_kernel, unpack_nibbles
from quantizer.qparams import contiguous_groups
from quantizer.result import GroupedWeight
from quantizer.schemes import GPTQScheme
from quantizer.tuning.rounding import Grid, start
from quantizer.tuning.schedule import Schedule, make_schedule
from quantizer.tuning.training import (
    Batch,
    BlockTraining,
    KernelForm,
    Rates,
    Start,
    Trained,
    VectorForm,
)


def schedule_of(plan: Plan, block: int) -> Schedule:
    """The schedule of one block; micro-batches are numbered in the order of the windows."""
    tokens, tuning = plan.tokens, plan.recipe.tuning
    assert tokens is not None
    assert tuning is not None
    assert plan.recipe.calibration is not None
    return make_schedule(
        sum(map(len, batch_numbers(plan))),
        held_back=tokens.held_back_batches,
        steps=tuning.steps,
        batch=max(1, tuning.batch // tokens.micro_batch),
        seed=plan.recipe.calibration.seed,
        block=block,
    )


def batch_numbers(plan: Plan) -> list[range]:
    """The numbers of each shard's micro-batches."""
    tokens = plan.tokens
    assert tokens is not None
    numbers, first = [], 0
    for a, b in tokens.shards:
        count = -(-(b - a) // tokens.micro_batch)
        numbers.append(range(first, first + count))
        first += count
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Forms:
    """What is trained of a block: layers with their forms, and the paths of norms with theirs."""

    kernels: tuple[tuple[LayerPlan, Target, KernelForm], ...]
    vectors: tuple[tuple[str, VectorForm], ...]

    @classmethod
    def of(cls, block: Block, layers: Sequence[LayerPlan], values: Values) -> _Forms:
        variables = block.layer.weights
        places = {str(v.path): place for place, v in enumerate(variables)}
        planned = {layer.path: layer for layer in layers}
        kernels = []
        for target in block.targets:
            layer, scheme = planned[target.path], planned[target.path].scheme
            if not layer.is_trainable:
                continue
            assert isinstance(scheme, GPTQScheme)
            form = KernelForm(
                place=places[target.kernel_path],
                shape=kernel_layout(target.layer).shape,
                dtype=str(variables[places[target.kernel_path]].dtype),
                weight_bits=scheme.weight_bits,
                group_size=scheme.group_size,
                scale_dtype=str(values[target.kernel_path].dtype),
            )
            kernels.append((layer, target, form))
        vectors = [
            (
                path,
                VectorForm(
                    place=places[path],
                    dtype=str(variables[places[path]].dtype),
                    stored_dtype=str(values[path].dtype),
                ),
            )
            for path in norm_paths(block)
        ]
        return cls(kernels=tuple(kernels), vectors=tuple(vectors))


def norm_paths(block: Block) -> list[str]:
    """Variables of the block's norms: of layers with vectors alone, and no layers inside."""
    variables = {str(v.path): v for v in block.layer.weights}
    owners = {path: path.rpartition("/")[0] for path in variables}
    wide = {owner for path, owner in owners.items() if len(variables[path].shape) != 1}
    outer = {a for a in owners.values() for b in owners.values() if b.startswith(f"{a}/")}
    return [
        path
        for path, owner in owners.items()
        if owner not in wide | outer and variables[path].trainable
    ]


def tuning_batch(
    batch: MicroBatch, call: Call, program: BlockProgram, in_float: Sequence[Any]
) -> Batch:
    """A micro-batch that has not left the block, in NumPy, to send to the worker that trains it.

    Args:
        in_float: the float model's weights of the block.
    """
    assert batch.in_float is not None
    exact = batch.in_float.finish_block(call, program, in_float)
    targets = tuple(
        np.asarray(exact[call.gives[place]]) for place in hidden_states(program.outputs)
    )
    return Batch(
        taken=tuple(map(np.asarray, batch.taken(call))),
        targets=targets,
        masks=tuple(batch.batch.rows(target.shape[:-1]) for target in targets),
    )


class BlockTuner:
    """Trains blocks, and keeps what it has compiled."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._trainings: dict[tuple[Any, ...], BlockTraining] = {}

    def tune(
        self,
        block: Block,
        values: Values,
        weights: Sequence[Any],
        layers: Sequence[SolvedLayer],
        batches: Mapping[int, Batch],
    ) -> TunedBlock:
        """Train a block, and keep the better of before and after.

        Args:
            values: the source's arrays of the block.
            weights: the block's, in the order of `layer.weights`, quantized.
            layers: all that are quantized.
            batches: those that its schedule uses, by number.
        """
        forms = _Forms.of(block, self._plan.parts[block.index + 1].layers, values)
        if not forms.kernels:
            return TunedBlock(layers=list(layers), floats={}, record=None)
        solved = {layer.path: layer for layer in layers}
        schedule = schedule_of(self._plan, block.index)
        training = self._training(block, forms, batches[schedule.held_back[0]])
        begin, first = _start(forms, values, solved)
        held_back = [batches[number] for number in schedule.held_back]
        before = training.error(first, begin, weights, held_back)
        trained, after = first, before
        if math.isfinite(before):  # float16 may overflow: then there is nothing to descend
            steps = [[batches[number] for number in step] for step in schedule.steps]
            trained = training.train(first, begin, weights, steps, _rates(self._plan.recipe.tuning))
            after = training.error(trained, begin, weights, held_back)
        if not after < before:
            record = TuningRecord(
                kept="solved",
                solved_error=_finite(before),
                tuned_error=_finite(after),
                num_tokens=num_tokens(held_back),
                changed_codes=0.0,
                norms={},
            )
            return TunedBlock(layers=list(layers), floats={}, record=record)
        kernels, vectors = training.results(trained, begin)
        floats = _floats(forms, values, vectors)
        record = TuningRecord(
            kept="tuned",
            solved_error=before,
            tuned_error=after,
            num_tokens=num_tokens(held_back),
            changed_codes=_changed(begin, kernels),
            norms={path: _relative(values[path], floats[path]) for path in floats},
        )
        found = solved | _layers(forms, solved, kernels)
        return TunedBlock(layers=list(found.values()), floats=floats, record=record)

    def _training(self, block: Block, forms: _Forms, batch: Batch) -> BlockTraining:
        inputs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch.taken)
        kernels = tuple(form for *_, form in forms.kernels)
        vectors = tuple(form for _, form in forms.vectors)
        key = (block.signature, kernels, vectors, inputs)
        if key not in self._trainings:
            traced, _ = trace_block(block, inputs, [])
            run, given = jaxpr_as_fun(traced), hidden_states(traced.out_avals)
            self._trainings[key] = BlockTraining(
                lambda weights, taken: [run(*weights, *taken)[i] for i in given],
                kernels,
                vectors,
            )
        return self._trainings[key]


def num_tokens(batches: Sequence[Batch]) -> int:
    """Vectors that an error is over."""
    return sum(int(np.count_nonzero(mask)) for batch in batches for mask in batch.masks)


def _start(
    forms: _Forms, values: Values, solved: Mapping[str, SolvedLayer]
) -> tuple[Start, Trained]:
    """Where training starts, and steps that change nothing yet."""
    grids, steps = [], []
    for layer, target, form in forms.kernels:
        layout, variables = kernel_layout(target.layer), solved[layer.path].variables
        codes = variables["quantized_kernel"]
        if form.weight_bits == 4:
            columns = layout.in_features * layout.out_features // layout.keras_rows
            codes = unpack_nibbles(codes, columns, axis=0)
        assert np.array_equal(
            variables["g_idx"], contiguous_groups(layout.keras_rows, form.group_size)
        )
        grid = Grid(
            np.ascontiguousarray(codes),
            variables["kernel_scale"].astype(np.float32),
            variables["kernel_zero"].astype(np.float32),
        )
        grids.append(grid)
        steps.append(start(grid))
    vectors = tuple(values[path].astype(np.float32) for path, _ in forms.vectors)
    zeros = tuple(map(np.zeros_like, vectors))
    return Start(tuple(grids), vectors), Trained(tuple(steps), zeros)


def _layers(
    forms: _Forms,
    solved: Mapping[str, SolvedLayer],
    kernels: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]],
) -> dict[str, SolvedLayer]:
    """The trained layers as they are stored, by path."""
    found = {}
    for (layer, target, _), (codes_RC, scale_RG) in zip(forms.kernels, kernels, strict=True):
        before = solved[layer.path]
        assert layer.scheme is not None
        zero_RG, group_C = before.variables["kernel_zero"], before.variables["g_idx"]
        weight = GroupedWeight(codes_RC, scale_RG, zero_RG, group_C.astype(np.int32))
        variables = encode_kernel(weight, kernel_layout(target.layer), layer.scheme)
        found[layer.path] = replace(before, variables=variables)
    return found


def _floats(
    forms: _Forms, values: Values, vectors: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[Any]]:
    """The trained norms in the dtypes that store them, by path."""
    return {
        path: vector.astype(values[path].dtype)
        for (path, _), vector in zip(forms.vectors, vectors, strict=True)
    }


def _rates(tuning: Tuning | None) -> Rates:
    assert tuning is not None
    return Rates(offset=tuning.offset_rate, scale=tuning.scale_rate, norm=tuning.norm_rate)


def _changed(
    begin: Start, kernels: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]]
) -> float:
    pairs = [(grid.code_RC, codes) for grid, (codes, _) in zip(begin.grids, kernels, strict=True)]
    changed = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
    return changed / sum(codes.size for codes, _ in kernels)


def _relative(before: NDArray[Any], after: NDArray[np.float32]) -> float:
    old = before.astype(np.float64)
    size = float(np.linalg.norm(old))
    return float(np.linalg.norm(after.astype(np.float64) - old)) / size if size else 0.0


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
