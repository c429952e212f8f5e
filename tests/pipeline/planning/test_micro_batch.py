"""Micro-batches are small on CPUs; on GPUs as large as memory allows, whoever the workers are."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.windows import shard_bounds
from pipeline.executor.protocol import DeviceMemory
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning import make_plan as planning
from pipeline.planning.estimates import estimate
from pipeline.planning.micro_batch import fitting_micro_batch, micro_batches
from tests.pipeline.planning.small_plans import plan
from tests.pipeline.tiny_runs import recipe, source

MIB = 1 << 20


def on_gpu(largest_array_bytes: int = 64 * MIB) -> Plan:
    """Eight windows at once."""
    given = plan()
    assert given.tokens is not None
    tokens = dataclasses.replace(
        given.tokens,
        micro_batch=8,
        shards=shard_bounds(8, 8),
        largest_array_bytes=largest_array_bytes,
    )
    return dataclasses.replace(given, tokens=tokens, machine={"platform": "gpu", "device": "H100"})


def least(given: Plan) -> int:
    """Bytes with which the plan just fits."""
    assert given.tokens is not None
    return estimate(given, len(given.tokens.shards)).beside_devices().device_bytes


def test_what_fits_stays_as_planned() -> None:
    given = on_gpu()
    assert fitting_micro_batch(given, least(given)) is None
    assert fitting_micro_batch(given, None) is None


def test_it_is_halved_until_it_fits() -> None:
    given = on_gpu()
    assert fitting_micro_batch(given, least(given) - 1) == 4
    # Two copies of the largest array, of which a quarter and an eighth are left.
    assert fitting_micro_batch(given, least(given) - 96 * MIB) == 2
    assert fitting_micro_batch(given, 0) == 1


def test_a_cpu_has_its_own() -> None:
    assert fitting_micro_batch(plan(), 1) is None


def test_a_plan_for_a_small_gpu_has_small_micro_batches_and_whole_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = read_preset(str(source()))
    given = recipe("gptq", num_samples=16, sequence_length=128)
    on_cpu = planning.make_plan(preset, given, threads=1, read_weights=False).plan
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(planning, "machine", lambda threads: {"platform": "gpu", "device": "small"})
    memory = DeviceMemory(node="here", kind="small", num_bytes=None)
    monkeypatch.setattr(planning, "device_memory", lambda: memory)
    roomy = planning.make_plan(preset, given, threads=1, read_weights=False).plan
    assert roomy.tokens is not None
    assert roomy.tokens.micro_batch == 16
    memory = dataclasses.replace(memory, num_bytes=least(roomy) - 1)
    small = planning.make_plan(preset, given, threads=1, read_weights=False).plan
    assert small.tokens is not None
    assert small.tokens.micro_batch == 8
    assert small.tokens.shards == ((0, 16),)
    assert small.tokens.largest_array_bytes * 2 == roomy.tokens.largest_array_bytes
    assert [part.groups for part in small.parts] == [part.groups for part in roomy.parts]
    assert on_cpu.tokens is not None
    assert on_cpu.tokens.micro_batch == 4


@given(st.integers(1, 100_000), st.integers(2, 10_000))
def test_shards_hold_whole_micro_batches_and_are_few(num_samples: int, length: int) -> None:
    for platform in ("cpu", "gpu"):
        check(*micro_batches(num_samples, length, platform), num_samples, length)


def check(micro_batch: int, per_shard: int, num_samples: int, length: int) -> None:
    assert 1 <= micro_batch <= num_samples
    assert per_shard % micro_batch == 0
    assert -(-num_samples // per_shard) <= 32
    assert micro_batch == 1 or micro_batch * length <= 2048
