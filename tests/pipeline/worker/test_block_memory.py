"""What a block keeps on a device: no scores where cuDNN computes attention, and no masks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import pipeline.planning.make_plan
from pipeline.calibration.windows import TokenWindows
from pipeline.executor.protocol import DeviceMemory
from pipeline.model.blocks import Block, find_blocks
from pipeline.model.call_shapes import taken_by
from pipeline.model.inputs import input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.plan import Plan
from pipeline.planning.estimates import estimate
from pipeline.planning.input_groups import embedded_shapes
from pipeline.planning.make_plan import make_plan
from pipeline.worker.block_memory import BlockMemory
from pipeline.worker.block_program import BlockProgram
from tests.cuda.topology import tracing_for_h100
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import planned, recipe

LENGTH = 96
HEADS = 4
SCORES_BYTES = HEADS * LENGTH * LENGTH * 4


def block_of(
    architecture: str, dtype: str, batch: int = 1
) -> tuple[Block, tuple[jax.ShapeDtypeStruct, ...]]:
    """A first block, and what it takes."""
    preset = read_preset(str(shared_preset(architecture, num_blocks=1)))
    skeleton = build_skeleton(preset, dtype)
    graph, layout = find_blocks(skeleton), input_layout(skeleton)
    windows = TokenWindows(
        tokens=np.zeros((batch, LENGTH), np.int32),
        lengths=np.full(batch, LENGTH, np.int32),
        fingerprint="",
        num_documents=1,
    )
    block = graph.blocks[0]
    return block, taken_by(block.calls[0], embedded_shapes(graph, layout, windows, batch))


def memory(architecture: str, dtype: str) -> BlockMemory:
    block, taken = block_of(architecture, dtype)
    return BlockProgram(block, {target.name: "hessian" for target in block.targets}, taken).memory


def test_attention_in_16_bits_is_left_to_cudnn_without_scores() -> None:
    with tracing_for_h100():
        fused, whole = memory("Llama3", "bfloat16"), memory("Llama3", "float32")
    assert fused.attention == "cudnn"
    assert fused.largest_array_bytes < SCORES_BYTES / 2
    assert whole.attention == "scores"
    assert whole.largest_array_bytes == SCORES_BYTES
    # As any block on a CPU has it.
    assert memory("Llama3", "bfloat16").attention == "scores"


def test_attention_that_cudnn_cannot_do_is_told_apart() -> None:
    with tracing_for_h100():
        assert memory("Bloom", "bfloat16").attention == "scores"


def kept(architecture: str, batch: int) -> Iterator[Any]:
    """What each stage leaves to the next."""
    block, taken = block_of(architecture, "float32", batch)
    found = BlockProgram(block, {target.name: "hessian" for target in block.targets}, taken)
    weights = [np.ones(v.shape, v.dtype) for v in block.layer.weights]
    live: tuple[Any, ...] = tuple(np.ones(x.shape, x.dtype) for x in taken)
    for stage in range(len(found.groups)):
        _, live = found.run_stage(stage, weights, live)
        yield from live


@pytest.mark.parametrize("architecture", ["Llama3", "GPT2"])
def test_masks_are_computed_again_and_not_kept(architecture: str) -> None:
    shapes = [value.shape for value in kept(architecture, 3)]
    assert (3, LENGTH) in shapes  # what they follow from
    assert not [shape for shape in shapes if shape.count(LENGTH) > 1]


def plan_on_gpu(dtype: str) -> Plan:
    module = pipeline.planning.make_plan
    preset = read_preset(str(shared_preset("Llama3", num_blocks=2, dtype=dtype)))
    wanted = recipe("gptq", num_samples=20, sequence_length=128)
    with pytest.MonkeyPatch.context() as patched, tracing_for_h100():
        patched.setattr(module, "jax", SimpleNamespace(default_backend=lambda: "gpu"))
        patched.setattr(module, "machine", lambda _: {"platform": "gpu", "device": "H100"})
        has = DeviceMemory(node="node", kind="NVIDIA H100", num_bytes=72 << 30)
        patched.setattr(module, "device_memory", lambda: has)
        return make_plan(preset, wanted, threads=2).plan


def test_a_gpus_plan_says_what_computes_attention() -> None:
    fused, whole = plan_on_gpu("bfloat16"), plan_on_gpu("float32")
    assert whole.tokens is not None
    assert fused.content()["tokens"]["attention"] == "cudnn"
    assert Plan.from_json(fused.to_json()) == fused
    scores_bytes = whole.tokens.micro_batch * HEADS * 128 * 128 * 4
    assert whole.tokens.largest_array_bytes == scores_bytes
    assert estimate(whole, 1).micro_batch_bytes == 2 * scores_bytes
    assert estimate(fused, 1).device_bytes < estimate(whole, 1).device_bytes
    # A CPU's plans stay what they were.
    assert (
        not {"attention", "largest_array_bytes"} & planned("gptq").plan.content()["tokens"].keys()
    )
