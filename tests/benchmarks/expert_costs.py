"""What large mixtures of experts cost on paper: hours on H100s, what bounds them, what travels.

    KERAS_BACKEND=jax python -m tests.benchmarks.expert_costs

The shapes are those of the models' published configurations, planned as `tests.benchmarks.costs`
does, on 512 windows of 2,048 tokens; nothing is downloaded or run. KerasHub has no model of
DeepSeek-V3's, whose plan is made here, of gptq at 4 bits for all matrices.

Experts' down matrices are calibrated on rows of their own, of which workers send each other sums.
The last table has the bytes that a worker receives in a block so, and if it were sent the rows.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.calibration.windows import shard_bounds
from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan
from pipeline.planning.cost_model import run_cost
from pipeline.planning.estimates import estimate
from pipeline.planning.machines import Machine, known_machines
from pipeline.planning.micro_batch import micro_batches
from pipeline.planning.stage_constants import CONSTANTS
from pipeline.planning.work import block_work, planned_on
from pipeline.recipe.recipe import Recipe
from pipeline.tokens_plan import TokensPlan
from quantizer import row_slices
from quantizer.experts import num_expert_ranges
from quantizer.schemes import GPTQScheme, Int8Scheme
from tests.benchmarks.costs import large_plan

SCHEME = GPTQScheme(weight_bits=4, group_size=128)
NUM_SAMPLES, SEQUENCE_LENGTH = 512, 2048


@dataclass(frozen=True)
class Shape:
    """A model whose blocks are all alike.

    Attributes:
        attention: inputs and outputs of its layers, by the number of the input that they read.
        inner: of an expert; shared: of the expert that all tokens share, 0 for none.
    """

    name: str
    num_blocks: int
    vocabulary: int
    hidden: int
    attention: tuple[tuple[int, int, int], ...]
    num_experts: int
    per_token: int
    inner: int
    shared: int = 0


DEEPSEEK = Shape(
    "as DeepSeek-V3", 61, 129_280, 7168,
    ((0, 7168, 1536), (0, 7168, 576), (1, 1536, 24576), (2, 512, 32768), (3, 16384, 7168)),
    256, 8, 2048, 2048,
)  # fmt: skip
NAMES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b")
WORKERS = (2, 8, 16)


def planned(shape: Shape) -> Plan:
    """A plan of bfloat16 weights."""
    micro_batch, shard = micro_batches(NUM_SAMPLES, SEQUENCE_LENGTH, "cpu")
    table = _layer("table", shape.hidden, 2 * shape.vocabulary)  # and the output head
    table = dataclasses.replace(table, kind="embedding", scheme=None)
    return Plan(
        source_url="",
        source_files_sha256="",
        model=shape.name,
        task="",
        recipe=Recipe(name="paper", scheme=Int8Scheme()),
        tokens=TokensPlan(
            key="",
            digest="",
            fingerprint="",
            num_samples=NUM_SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
            micro_batch=micro_batch,
            shards=shard_bounds(NUM_SAMPLES, shard),
        ),
        parts=(_part(0, (table,), ()), *(_block(shape, i + 1) for i in range(shape.num_blocks))),
        machine={"platform": "cpu", "device": "", "threads": "1"},
        versions={},
    )


def _block(shape: Shape, number: int) -> PartPlan:
    layers, groups = [], []
    for stage in sorted({stage for stage, _, _ in shape.attention}):
        reading = [
            _layer(f"attention_{i}", inputs, outputs)
            for i, (own, inputs, outputs) in enumerate(shape.attention)
            if own == stage
        ]
        layers += reading
        groups.append(_group(reading))
    gates = [_experts(shape, name, shape.hidden, shape.inner) for name in ("gate", "up")]
    if shape.shared:
        gates += [_layer(f"shared_{x}", shape.hidden, shape.shared) for x in ("gate", "up")]
    down = _experts(shape, "down", shape.inner, shape.hidden)
    ranges = num_expert_ranges(shape.num_experts, shape.inner)
    down = dataclasses.replace(down, slices=ranges)
    layers += [*gates, down]
    groups += [_group(gates), dataclasses.replace(_group([down]), experts=shape.num_experts)]
    if shape.shared:
        layers.append(_layer("shared_down", shape.shared, shape.hidden))
        groups.append(_group(layers[-1:]))
    return _part(number, tuple(layers), tuple(groups))


def _part(number: int, layers: tuple[LayerPlan, ...], groups: tuple[InputGroup, ...]) -> PartPlan:
    return PartPlan(
        part=number,
        name=str(number),
        source_bytes=2 * sum(layer.num_weights for layer in layers),
        source_sha256="",
        layers=layers,
        groups=groups,
    )


def _group(layers: list[LayerPlan]) -> InputGroup:
    names = tuple(layer.name for layer in layers)
    return InputGroup(targets=names, in_features=layers[0].in_features, statistics="hessian")


def _layer(name: str, inputs: int, outputs: int) -> LayerPlan:
    return LayerPlan(
        path=name,
        name=name,
        kind="kernel",
        in_features=inputs,
        out_features=outputs,
        scheme=SCHEME,
        slices=len(row_slices(outputs, inputs)),
    )


def _experts(shape: Shape, name: str, inputs: int, outputs: int) -> LayerPlan:
    layer = _layer(name, inputs, outputs * shape.num_experts)
    return dataclasses.replace(
        layer,
        out_features=outputs,
        experts=shape.num_experts,
        experts_per_token=shape.per_token,
    )


def plans() -> dict[str, Plan]:
    """By the model's name."""
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = large_plan(name, Path(folder), num_samples=NUM_SAMPLES)
    return {**found, DEEPSEEK.name: planned(DEEPSEEK)}


def print_costs(name: str, plan: Plan, machine: Machine) -> None:
    """Hours on one and eight of a machine, and the stages that take most of them."""
    for workers in (1, 8):
        costs = estimate(planned_on(plan, "gpu"), workers)
        if workers == 1:
            print(
                f"\n{name}: {costs.weights / 1e9:.0f} billion weights, "
                f"{costs.active_weights / 1e9:.1f} for a token; {costs.tokens_per_expert:,} "
                f"tokens an expert, {costs.advised_tokens:,} advised in all; artifact "
                f"{costs.result_bytes / 1e9:.0f} GB, codes {costs.codes_bytes / 1e9:.0f} GB"
            )
        cost = run_cost(plan, machine, workers)
        stages = sorted(cost.stages, key=lambda stage: -stage.seconds)[:4]
        described = ", ".join(
            f"{stage.name} {stage.seconds / 3600:.2f} h ({stage.bound})" for stage in stages
        )
        print(
            f"  {workers} × {machine.name}: {cost.seconds / 3600:.1f} h: {described}; GPU "
            f"{costs.device_bytes / 1e9:.0f} GB, of which activations "
            f"{costs.held_bytes / 1e9:.0f}, host {costs.worker_bytes / 1e9:.0f} GB"
        )


def received(plan: Plan, workers: int, num_tokens: int) -> tuple[float, float]:
    """Bytes of a block that the worker with most of them receives: of sums, and if of rows."""
    plan = planned_on(plan, "gpu")
    part = plan.parts[1]
    layers = {layer.name: layer for layer in part.layers}
    work = block_work(plan, part, CONSTANTS["gpu"])
    sums = sum(one.received_bytes(workers, 0) for one in work.solve if one.owned)
    rows = sum(
        2.0 * num_tokens * group.in_features * layers[group.targets[0]].experts_per_token
        for group in part.groups
        if group.experts
    )
    return sums, rows / workers * (workers - 1) / workers


def print_travel(found: Mapping[str, Plan]) -> None:
    """A table for the documentation."""
    few, many = 128 * SEQUENCE_LENGTH, NUM_SAMPLES * SEQUENCE_LENGTH
    print(f"\n| GB a worker receives in a block: sums; rows of {few:,} and of {many:,} tokens |")
    print("| --- |" + " ---: |" * len(WORKERS))
    for name, plan in found.items():
        cells = []
        for workers in WORKERS:
            sums, rows = received(plan, workers, few)
            cells.append(f"{sums / 1e9:.2f}; {rows / 1e9:.2f}, {rows * many / few / 1e9:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    machine = known_machines().named("H100")
    print(f"{NUM_SAMPLES * SEQUENCE_LENGTH:,} tokens of calibration, on {machine.name}")
    found = plans()
    for name, plan in found.items():
        print_costs(name, plan, machine)
    print_travel(found)


if __name__ == "__main__":
    main()
