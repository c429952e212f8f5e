"""Plans written by hand, small enough to count their work on paper."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.plan import InputGroup, LayerPlan, PartPlan, Plan
from pipeline.planning.machines import Machine
from pipeline.recipe.recipe import Recipe
from pipeline.tokens_plan import TokensPlan
from quantizer.experts import num_expert_ranges
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme

GPTQ = GPTQScheme(weight_bits=4, group_size=32, scale_search=False)


def layer(name: str, inputs: int, outputs: int, **options: Any) -> LayerPlan:
    given: dict[str, Any] = {"kind": "kernel", "scheme": GPTQ, **options}
    return LayerPlan(path=name, name=name, in_features=inputs, out_features=outputs, **given)


def block(part: int, scheme: Scheme | None = GPTQ) -> PartPlan:
    """64 → 128 → 64, of float32."""
    layers = (layer("up", 64, 128, scheme=scheme), layer("down", 128, 64, scheme=scheme))
    groups: tuple[InputGroup, ...] = ()
    if isinstance(scheme, GPTQScheme):
        groups = (
            InputGroup(targets=("up",), in_features=64, statistics="hessian"),
            InputGroup(targets=("down",), in_features=128, statistics="hessian"),
        )
    return PartPlan(
        part=part,
        name=f"block {part}",
        source_bytes=4 * 2 * 64 * 128,
        source_sha256="",
        layers=layers,
        groups=groups,
    )


def plan(num_blocks: int = 2, scheme: Scheme | None = GPTQ) -> Plan:
    """So many blocks, calibrated on 8 windows of 16 tokens in 4 shards."""
    table = layer("table", 64, 1000, kind="embedding", scheme=None)
    rest = PartPlan(part=0, name="rest", source_bytes=4 * 64_000, source_sha256="", layers=(table,))
    tokens = TokensPlan(
        key="",
        digest="",
        fingerprint="",
        num_samples=8,
        sequence_length=16,
        micro_batch=1,
        shards=((0, 2), (2, 4), (4, 6), (6, 8)),
    )
    return Plan(
        source_url="",
        source_files_sha256="",
        model="",
        task="",
        recipe=Recipe(name="small", scheme=Int8Scheme()),
        tokens=tokens if isinstance(scheme, GPTQScheme) else None,
        parts=(rest, *(block(number + 1, scheme) for number in range(num_blocks))),
        machine={"platform": "cpu", "device": "", "threads": "1"},
        versions={},
    )


def experts_plan(num_experts: int, hidden: int, inner: int, per_token: int) -> Plan:
    """Two blocks of gated experts alone, on the same windows as `plan`."""
    some = {"experts": num_experts, "experts_per_token": per_token}
    ranges = num_expert_ranges(num_experts, inner)
    layers = (
        layer("gate_up", hidden, 2 * inner, **some),
        layer("down", inner, hidden, slices=ranges, **some),
    )
    groups = (
        InputGroup(targets=("gate_up",), in_features=hidden, statistics="hessian"),
        InputGroup(targets=("down",), in_features=inner, statistics="hessian", experts=num_experts),
    )
    parts = [
        dataclasses.replace(
            block(number),
            source_bytes=4 * sum(one.num_weights for one in layers),
            layers=layers,
            groups=groups,
        )
        for number in (1, 2)
    ]
    return dataclasses.replace(plan(), parts=(plan().parts[0], *parts))


def slow_machine(**rates: Any) -> Machine:
    """Does a million operations or bytes a second, and a thousand steps, of each kind."""
    million = 1e6
    given: dict[str, Any] = {
        "name": "slow",
        "device": "cpu",
        "float32_flops": million,
        "bfloat16_flops": million,
        "float32_achievable": 1.0,
        "bfloat16_achievable": 1.0,
        "memory_bytes": 1e12,
        "memory_bytes_per_second": million,
        "memory_achievable": 1.0,
        "transfer_bytes_per_second": million,
        "transfer_achievable": 1.0,
        "step_seconds": 1e-3,
        "host_threads": 1,
        "host_bytes_per_second": million,
        "host_hash_bytes_per_second": million,
        "storage_bytes_per_second": million,
        "network_bytes_per_second": million,
        "workers_per_node": 1,
        "source": "a test",
    }
    return Machine.model_validate(given | rates)


def with_layers(plan: Plan, **changes: Any) -> Plan:
    """A plan with all layers in its blocks changed."""
    parts = [
        dataclasses.replace(
            part, layers=tuple(dataclasses.replace(x, **changes) for x in part.layers)
        )
        for part in plan.parts[1:]
    ]
    return dataclasses.replace(plan, parts=(plan.parts[0], *parts))
