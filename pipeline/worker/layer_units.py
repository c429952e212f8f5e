"""Which layers of a block have to be of one run, where its layers come from several.

Layers that read one input are computed as one by runtimes: vLLM joins query, key and value, and
gate and up, in one matrix of one format. All experts of a block go through one kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.model.blocks import Block, Call
from pipeline.model.call_shapes import Shapes, taken_by
from pipeline.worker.block_program import hidden_states, trace_block

Units = tuple[tuple[str, ...], ...]
"""Paths of layers that stay together."""


def layer_units(block: Block, call: Call, values: Shapes, num_windows: int) -> Units:
    """The units of a block, in the order of its layers; none if it gives no hidden states.

    Args:
        call: one of the block's.
        values: shapes and dtypes of what is live before it, and before the glue in front of it.
        num_windows: in them.
    """
    layers = [target for target in block.targets if not target.num_experts]
    traced, names = trace_block(block, taken_by(call, dict(values)), layers)
    tensors = traced.jaxpr.outvars
    if not compared_states([v.aval for v in tensors[len(names) :]], num_windows):
        return ()
    inputs: dict[str, tuple[int, ...]] = {}
    for name, tensor in zip(names, tensors, strict=False):
        inputs[name] = (*inputs.get(name, ()), id(tensor))  # which `traced` keeps alive
    units: dict[tuple[object, ...], list[str]] = {}
    for target in block.targets:
        alone = ("experts",) if target.num_experts else (target.path,)
        units.setdefault(inputs.get(target.name, alone), []).append(target.path)
    return tuple(map(tuple, units.values()))


def compared_states(given: Sequence[Any], num_windows: int) -> list[int]:
    """Of what a block gives, by place: hidden states, window by window.

    Args:
        given: shapes and dtypes, or arrays.
    """
    return [place for place in hidden_states(given) if given[place].shape[0] == num_windows]
