"""Estimates agree with measured memory and bytes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import pytest

from pipeline.executor.protocol import Allocation
from pipeline.executor.worker_environment import worker_environment
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning.estimates import estimate
from pipeline.planning.make_plan import make_plan
from pipeline.planning.stored_sizes import bits_per_weight
from pipeline.recipe.recipe import Recipe
from pipeline.storage.object_store import open_store
from quantizer.experts import num_expert_ranges
from quantizer.gptq.column_loop import Columns
from quantizer.gptq.refit import _refit_unit, unit_size
from quantizer.schemes import Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from tests.benchmarks import expert_memory
from tests.families.tiny_families import FAMILIES, shared_family, tiny_family
from tests.integration.quantized import recipe as integration_recipe
from tests.models.tiny import tiny_preset
from tests.pipeline.tiny_runs import correcting_drift, execute, planned, recipe, source
from tests.selection import by_default

ROOT = Path(__file__).parents[3]
# A worker process like Ray's that does a whole run.
_PROGRAM = """
import resource, sys
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from pathlib import Path
from tests.pipeline.local_executor import LocalExecutor
from pipeline.run.claim import claim
from pipeline.plan import Plan
from pipeline.run.driver import quantize
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
plan, windows, source, output = sys.argv[1:]
store = open_store(output)
plan = claim(store, Plan.from_json(Path(plan).read_bytes()), Path(windows).read_bytes())
executor = LocalExecutor([Worker(plan, source, output)])
quantize(plan, store, executor, lambda step: None, keep_every=2)
# Not getrusage, whose maximum is inherited from the parent process.
status = Path("/proc/self/status").read_text().splitlines()
[peak] = [line.split()[1] for line in status if line.startswith("VmHWM:")]
print(int(peak) * 1024)
"""


def run_and_weigh(
    folder: Path, scheme: str, *, limit_bytes: int | None = None, **size: int
) -> tuple[int, Plan]:
    """Peak memory of a process that does a whole run, in bytes; and its plan; of a Llama."""
    preset = tiny_preset("Llama3", folder / "source", **size)
    return weighed(folder, preset, scheme, limit_bytes=limit_bytes)


def weighed(
    folder: Path, preset: Path, scheme: str, *, limit_bytes: int | None = None
) -> tuple[int, Plan]:
    """Peak memory of a process that does a whole run, in bytes; and its plan.

    Args:
        limit_bytes: of memory that the kernel lets the process have (`ulimit -d`).
    """
    wanted = recipe(scheme, num_samples=32, sequence_length=128)
    given = make_plan(read_preset(str(preset)), wanted, threads=2)
    (folder / "plan.json").write_bytes(given.plan.to_json())
    windows = given.windows
    (folder / "windows").write_bytes(b"" if windows is None else windows.to_bytes())
    arguments = [folder / "plan.json", folder / "windows", preset, folder / "run"]
    one = Allocation(workers=1, threads=2)
    environment = os.environ | worker_environment(one)
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(limit_bytes or 0), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return int(json.loads(finished.stdout)), given.plan


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scheme", ["gptq", "int8"])
def test_a_model_larger_than_a_worker_s_memory_is_quantized_within_it(
    scheme: str, tmp_path: Path
) -> None:
    """4 GB of weights, in a process that the kernel refuses more than 2.6 GB in all.

    What it refuses is address space: a fifth of that is stacks of threads that are never touched.
    """
    size = {"hidden_dim": 1024, "intermediate_dim": 4096, "num_blocks": 64}
    limit_bytes = 2_600_000_000
    peak_bytes, plan = run_and_weigh(tmp_path, scheme, limit_bytes=limit_bytes, **size)
    costs = estimate(plan, 1)
    assert costs.source_bytes > 1.4 * limit_bytes
    assert peak_bytes < limit_bytes
    assert costs.worker_bytes < limit_bytes
    print(f"{scheme}: {costs.source_bytes:,} bytes of weights, peak {peak_bytes:,}")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "size",
    [
        pytest.param({"hidden_dim": 512, "intermediate_dim": 2048, "num_blocks": 4}, id="512"),
        pytest.param(
            {"hidden_dim": 1024, "intermediate_dim": 4096, "num_blocks": 2},
            id="1024",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("scheme", ["gptq", "awq", "int8"])
def test_a_worker_takes_no_more_memory_than_estimated(
    scheme: str, size: dict[str, int], tmp_path: Path
) -> None:
    peak_bytes, plan = run_and_weigh(tmp_path, scheme, **size)
    estimated = estimate(plan, 1).worker_bytes
    assert peak_bytes <= estimated
    assert estimated < 3 * peak_bytes  # an upper bound that still says something


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("gptq", marks=pytest.mark.slow),
        pytest.param("int8", marks=pytest.mark.exhaustive),
    ],
)
def test_a_worker_with_experts_takes_no_more_memory_than_estimated(
    scheme: str, tmp_path: Path
) -> None:
    [family] = (family for family in FAMILIES if family.name == "Qwen3Moe")
    size = {"hidden_dim": 512, "moe_intermediate_dim": 256, "num_experts": 64, "top_k": 4}
    wide = dataclasses.replace(family, options={**family.options, **size})
    peak_bytes, plan = weighed(tmp_path, tiny_family(wide, tmp_path / "source"), scheme)
    estimated = estimate(plan, 1).worker_bytes
    print(f"{scheme}: peak {peak_bytes:,}, estimated {estimated:,}")
    assert peak_bytes <= estimated
    assert estimated < 3 * peak_bytes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    peaks = {}
    # The first run compiles, which takes memory of its own, so it is measured again.
    for attempt, num_blocks in enumerate((4, 4, 8, 16, 32)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        peaks[num_blocks], plan = run_and_weigh(
            folder, "gptq", hidden_dim=512, intermediate_dim=2048, num_blocks=num_blocks
        )
        per_block = max(part.source_bytes for part in plan.parts[1:])
    print({num_blocks: f"{peak:,}" for num_blocks, peak in peaks.items()}, f"{per_block=:,}")
    # 28 more blocks; not even two of them fit below this limit.
    assert peaks[32] - peaks[4] < 2 * per_block + (8 << 20), peaks


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_128_experts_of_a_published_shape_go_through_in_the_memory_that_is_planned(
    tmp_path: Path,
) -> None:
    """A block of Qwen3-30B-A3B's shape; it takes 10 GB."""
    found = expert_memory.weighed(tmp_path, vocab_size=512, num_hidden_layers=1)
    print(f"peak {found.peak_bytes:,}, planned {found.costs.worker_bytes:,}")
    assert found.peak_bytes <= found.costs.worker_bytes
    assert found.costs.worker_bytes < 2 * found.peak_bytes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_memory_with_experts_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    small = expert_memory.SMALL
    few, more = (
        expert_memory.weighed(tmp_path / str(blocks), **{**small, "num_hidden_layers": blocks})
        for blocks in (2, 5)
    )
    print(f"peaks {few.peak_bytes:,}, {more.peak_bytes:,}")
    for found in (few, more):
        assert found.peak_bytes <= found.costs.worker_bytes
    per_block = (more.costs.source_bytes - few.costs.source_bytes) // 3
    assert more.peak_bytes - few.peak_bytes < per_block


def test_source_bytes_are_those_of_the_source() -> None:
    plan = planned("gptq").plan
    assert estimate(plan, 1).source_bytes == sum(part.source_bytes for part in plan.parts)


@pytest.mark.parametrize("scheme", by_default(["gptq", "awq", "float8", "int8"], ["gptq", "int8"]))
def test_result_bytes_are_close_to_what_is_written(scheme: str) -> None:
    store = open_store(f"memory://test-estimates/{scheme}")
    execute(planned(scheme), store)
    stored = sum(
        len(store.get(key)) for key in store.list("artifact/model_") if key.endswith(".h5")
    )
    plan = planned(scheme).plan
    if scheme == "float8":  # three histories of 1,024 maxima in each layer
        layers = [x for part in plan.parts for x in part.layers if x.scheme]
        stored -= 3 * 4 * 1024 * len(layers)
    # Tiny files are half HDF5's own.
    overhead = 12_000 * len(plan.parts)
    estimated = estimate(plan, 1).result_bytes
    assert 0.9 * estimated < stored < 1.1 * estimated + overhead


def test_more_workers_share_the_activations_only() -> None:
    plan = planned("gptq").plan
    one, four = estimate(plan, 1), estimate(plan, 4)
    assert one.worker_bytes > four.worker_bytes
    assert (one.flops, one.source_bytes) == (four.flops, four.source_bytes)


def test_the_gpus_of_a_worker_share_its_activations() -> None:
    plan = dataclasses.replace(planned("gptq").plan, machine={"platform": "gpu", "device": "H100"})
    one, two, apart = estimate(plan, 1), estimate(plan, 1, 2), estimate(plan, 2)
    assert two.device_held_bytes == apart.held_bytes == apart.device_held_bytes
    assert two.held_bytes == one.held_bytes > two.device_held_bytes
    assert one.device_bytes > two.device_bytes
    # It has a sum sent by the other.
    assert two.device_bytes >= apart.device_bytes
    beside = two.beside_devices()
    assert beside.device_bytes == two.device_bytes - two.device_held_bytes
    assert beside.worker_bytes == two.worker_bytes + two.held_bytes


@pytest.mark.parametrize("group_size", [-1, 128])
def test_what_refits_scales_counts(group_size: int) -> None:
    """As the compiler reports it, for two slices at once of the widest layer."""
    inputs, rows = 1024, 256
    plan = dataclasses.replace(planned("gptq").plan, machine={"platform": "gpu", "device": "H100"})
    scheme = GPTQScheme(group_size=group_size, refinement_sweeps=1)

    def device_bytes(**changed: Any) -> int:
        wanted = dataclasses.replace(scheme, **changed)
        layers = tuple(
            dataclasses.replace(
                x, in_features=inputs, scheme=wanted if isinstance(x.scheme, GPTQScheme) else None
            )
            for x in plan.parts[1].layers
        )
        parts = (plan.parts[0], dataclasses.replace(plan.parts[1], layers=layers))
        return estimate(dataclasses.replace(plan, parts=parts), 1).device_bytes

    number, groups = jax.ShapeDtypeStruct((), "float32"), 1 if group_size == -1 else 8
    columns = Columns(
        jax.ShapeDtypeStruct((inputs, rows), "float32"),
        jax.ShapeDtypeStruct((inputs,), "int32"),
        *[jax.ShapeDtypeStruct((groups, rows), "float32")] * 2,
    )
    size = inputs if group_size == -1 else unit_size(group_size)
    compiled = (
        jax.jit(inspect.unwrap(_refit_unit), static_argnames=("size", "group_size", "scale_dtype"))
        .lower(
            columns,
            columns.weight_PR,
            jax.ShapeDtypeStruct((inputs, inputs), "float32"),
            *[number] * 2,
            jax.ShapeDtypeStruct((rows,), "float32"),
            0,
            15.0,
            size=size,
            group_size=inputs if group_size == -1 else group_size,
            scale_dtype="float32",
        )
        .compile()
    )
    # Beside arrays of the slice's columns, which every solve has.
    temporary = compiled.memory_analysis().temp_size_in_bytes - 4 * 4 * size * rows
    counted = device_bytes(scale_refit=True) - device_bytes()
    assert 0.5 * counted < 2 * temporary <= counted
    assert device_bytes(scale_refit=True, correlation_shrinkage=1.0) > device_bytes() + counted


def test_a_gpu_s_windows_are_those_that_its_worker_gives_it() -> None:
    """Eight shards are 4, 2 and 2 of three workers, and of a worker's GPUs; four are 2, 1 and 1."""
    plan = dataclasses.replace(planned("gptq").plan, machine={"platform": "gpu", "device": "H100"})
    assert plan.tokens is not None
    tokens = dataclasses.replace(plan.tokens, shards=tuple((i, i + 1) for i in range(8)))
    plan = dataclasses.replace(plan, tokens=tokens)
    one = estimate(plan, 8).held_bytes
    held = {(w, g): estimate(plan, w, g).device_held_bytes // one for w in (1, 3) for g in (1, 3)}
    assert held == {(1, 1): 8, (1, 3): 4, (3, 1): 4, (3, 3): 2}


def test_the_float_model_s_activations_count() -> None:
    plan = planned("gptq").plan
    alone, both = estimate(plan, 1), estimate(correcting_drift(plan), 1)
    assert both.activation_bytes == 2 * alone.activation_bytes
    assert both.held_bytes == 2 * alone.held_bytes
    assert both.forward_flops == 2 * alone.forward_flops
    widest = max(part.num_weights for part in plan.parts[1:])
    assert both.worker_bytes >= alone.worker_bytes + alone.held_bytes + 4 * widest
    on_gpu = dataclasses.replace(plan, machine={**plan.machine, "platform": "cuda"})
    alone, both = estimate(on_gpu, 1), estimate(correcting_drift(on_gpu), 1)
    assert both.device_bytes >= alone.device_bytes + alone.held_bytes + 4 * widest


def test_what_waits_beside_a_gpu_counts_for_its_node_alone() -> None:
    plan = planned("gptq").plan
    on_gpu = dataclasses.replace(plan, machine={"platform": "gpu", "device": "H100"})
    on_cpu, resident = estimate(plan, 1), estimate(on_gpu, 1)
    assert on_cpu.held_bytes == resident.held_bytes == 20 * 128 * (3 * 64 + 128) * 4 * 32 // 20
    beside = resident.beside_devices()
    assert resident.worker_bytes < beside.worker_bytes <= on_cpu.worker_bytes
    # A micro-batch that is computed, and two on their way, are on the device either way.
    two, four = (estimate(on_gpu, workers).beside_devices() for workers in (1, 2))
    assert two.device_bytes == four.device_bytes
    assert two.worker_bytes > four.worker_bytes


def test_layers_that_share_foldable_scales_are_held_at_once() -> None:
    def solved(name: str) -> int:
        plan = planned(name).plan
        wide = [
            dataclasses.replace(
                part,
                layers=tuple(
                    dataclasses.replace(x, out_features=1024) if x.in_features == 64 else x
                    for x in part.layers
                ),
            )
            for part in plan.parts
        ]
        return estimate(dataclasses.replace(plan, parts=tuple(wide), tokens=None), 1).worker_bytes

    # Of query, key and value two more, in three copies of float32.
    assert solved("awq-foldable") - solved("awq") == 3 * 4 * 64 * 2 * 1024


def test_flops_are_those_of_the_formulas() -> None:
    plan = planned("gptq").plan
    found = estimate(plan, 1)
    tokens = 20 * 128
    weights = 64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64
    assert found.forward_flops == 3 * 2 * weights * tokens
    assert found.solve_flops == pytest.approx(
        3 * ((64 + 32 + 32 + 64 + 128 + 128) * 64**2 + 64 * 128**2 + 2 / 3 * (3 * 64**3 + 128**3))
    )
    assert estimate(planned("int8").plan, 1).flops == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", [Int8Scheme(), Int4Scheme(block_size=32)])
def test_quantized_embeddings_count(scheme: Int8Scheme | Int4Scheme, tied: bool) -> None:
    wanted = Recipe(name="embeddings", scheme=None, embeddings=scheme)
    preset = read_preset(str(source(tied=tied)))
    plan = make_plan(preset, wanted, threads=1).plan
    [table] = [x for x in plan.parts[0].layers if x.kind == "embedding"]
    weights = table.in_features * table.out_features * (1 if tied else 2)
    saved_bits = weights * (32 - bits_per_weight(table, plan, 32))
    costs = estimate(plan, 1)
    assert costs.source_bytes - costs.result_bytes == int(saved_bits / 8)


@pytest.mark.parametrize(
    ("scheme", "weights_format", "source_bits", "wanted"),
    [
        (GPTQScheme(group_size=32), 1, 32, 4 + 40 / 32),
        (Int8Scheme(), 1, 16, 8 + 32 / 64),
        (Float8Scheme(), 1, 32, 32),
        (Float8Scheme(), 1, 16, 16),
        (Float8Scheme(), 2, 32, 11.2),
        (Float8Scheme(), 2, 16, 8.2),
        (Float8Scheme(power_of_two=True), 2, 32, 8.2),
        (None, 2, 16, 16),
    ],
)
def test_bits_of_a_weight_count_its_share_of_scales(
    scheme: Scheme | None, weights_format: Literal[1, 2], source_bits: int, wanted: float
) -> None:
    plan = dataclasses.replace(planned("gptq").plan, weights_format=weights_format)
    layer = next(x for x in plan.parts[1].layers if x.in_features == 64)
    layer = dataclasses.replace(layer, scheme=scheme)
    assert bits_per_weight(layer, plan, source_bits) == wanted


def experts_plan() -> Plan:
    wanted = integration_recipe(GPTQScheme(weight_bits=4, group_size=16))
    return make_plan(read_preset(str(shared_family("Mixtral"))), wanted, threads=1).plan


def test_a_token_needs_the_weights_of_the_experts_that_it_is_sent_to() -> None:
    """Mixtral's router sends a token to two of four experts."""
    plan, experts = experts_plan(), 2 * 3 * 4 * 32 * 64
    costs = estimate(plan, 1)
    assert costs.weights == sum(part.num_weights for part in plan.parts)
    assert costs.active_weights == costs.weights - experts // 2
    assert costs.codes_bytes == experts * (4 + 40 / 16) / 8
    assert plan.tokens is not None
    num_tokens = plan.tokens.num_samples * plan.tokens.sequence_length
    assert costs.tokens_per_expert == num_tokens // 2
    # Four rows for each of 64 inputs, and twice that since routers are uneven.
    assert costs.advised_tokens == 2 * 4 * 64 * 4 // 2


def test_of_a_model_of_which_only_such_experts_are_calibrated_the_costs_are_known() -> None:
    plan = experts_plan()
    parts = tuple(
        dataclasses.replace(part, groups=tuple(g for g in part.groups if g.experts))
        for part in plan.parts
    )
    costs = estimate(dataclasses.replace(plan, parts=parts), workers=1)
    assert 0 < costs.gram_flops < estimate(plan, workers=1).gram_flops
    assert 0 < costs.held_bytes <= estimate(plan, workers=1).held_bytes


def with_experts(plan: Plan, *, experts: int, in_features: int) -> Plan:
    """The plan with more experts in place of Mixtral's, and more inputs of their own."""
    ranges = num_expert_ranges(experts, in_features)
    own = {name for part in plan.parts for g in part.groups if g.experts for name in g.targets}
    return dataclasses.replace(
        plan,
        parts=tuple(
            dataclasses.replace(
                part,
                layers=tuple(
                    dataclasses.replace(x, experts=experts, in_features=in_features, slices=ranges)
                    if x.name in own
                    else x
                    for x in part.layers
                ),
                groups=tuple(
                    dataclasses.replace(g, experts=experts, in_features=in_features)
                    if g.experts
                    else g
                    for g in part.groups
                ),
            )
            for part in plan.parts
        ),
    )


def test_experts_beyond_what_is_summed_at_once_take_no_more_memory_but_their_weights() -> None:
    few, more = (with_experts(experts_plan(), experts=n, in_features=4096) for n in (128, 256))
    weights = 4 * (more.parts[1].num_weights - few.parts[1].num_weights)
    grown = estimate(more, 1).worker_bytes - estimate(few, 1).worker_bytes
    # The block's copies, a solve's, and what the experts make of a micro-batch.
    assert weights < grown < 9 * weights
    assert 4 * grown < 128 * 4 * 4096**2  # of the Hessians of 128 more experts
    # A token is sent to as many.
    assert estimate(more, 1).gram_flops == estimate(few, 1).gram_flops
