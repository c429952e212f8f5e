"""Work is counted from a plan's layers alone: by hand here, for plans small enough."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.plan import InputGroup
from pipeline.planning.solve_costs import GPU_BAND
from pipeline.planning.stage_constants import CONSTANTS
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.planning.work import Work, block_work, planned_on
from quantizer.gptq import path
from quantizer.schemes import AWQScheme, GPTQScheme, Int8Scheme
from tests.pipeline.planning.small_plans import GPTQ, block, experts_plan, layer, plan, with_layers

ONES = dataclasses.replace(
    CONSTANTS["cpu"],
    **{field.name: 1.0 for field in dataclasses.fields(CONSTANTS["cpu"])},
)
TOKENS = 8 * 16
WEIGHTS = 2 * 64 * 128


def test_a_forward_pass_is_every_layer_and_attention_over_all_tokens() -> None:
    found = block_work(plan(), plan().parts[1], ONES).forward
    passed = 64 + 128 + 128 + 64
    assert found == Work(
        float32_flops=2 * WEIGHTS * TOKENS + 4 * 16 * 64 * TOKENS,
        memory_bytes=4 * passed * TOKENS,
    )


def test_attention_grows_with_the_square_of_the_length() -> None:
    def attention(length: int) -> float:
        tokens = dataclasses.replace(given.tokens, sequence_length=length)
        found = block_work(dataclasses.replace(given, tokens=tokens), given.parts[1], ONES)
        return found.forward.float32_flops - 2 * WEIGHTS * 8 * length

    given = plan()
    assert given.tokens is not None
    assert attention(32) == 4 * attention(16)


def test_grams_are_ten_sixteenths_of_their_products_and_added_once_a_micro_batch() -> None:
    sizes = 64**2 + 128**2
    assert block_work(plan(), plan().parts[1], ONES).grams == Work(
        float32_flops=2 * sizes * TOKENS * 10 / 16,
        memory_bytes=8 * 4 * sizes * 10 / 16,
    )


def test_a_drift_is_a_whole_product_more_and_two_of_what_is_held_back() -> None:
    plain = plan()
    assert plain.tokens is not None
    held = dataclasses.replace(plain.tokens, held_back_every=8)
    given = with_layers(
        dataclasses.replace(plain, tokens=held),
        scheme=dataclasses.replace(GPTQ, drift_correction=1.0),
    )
    sizes = 64**2 + 128**2
    found, before = (block_work(one, one.parts[1], ONES) for one in (given, plain))
    assert found.grams.float32_flops - before.grams.float32_flops == (
        2 * sizes * TOKENS + 2 * sizes * 16
    )
    assert found.forward == before.forward * 2
    for ours, theirs, size in zip(found.solve, before.solve, (64, 128), strict=True):
        assert ours.sum_bytes - theirs.sum_bytes == 4 * (3 + 10 / 16) * size**2
        assert ours.rows == theirs.rows
        more = ours.shared.float32_flops - theirs.shared.float32_flops
        other = 64 * 128 // size
        assert more == pytest.approx(14 / 3 * size**3 + 12 * other * size**2)


def test_solving_is_a_factor_and_the_products_and_passes_of_the_rows() -> None:
    up, down = block_work(plan(), plan().parts[1], ONES).solve
    assert up.shared == Work(float32_flops=2 / 3 * 64**3, memory_bytes=6 * 4 * 64**2)
    assert up.rows == (
        Work(float32_flops=2 * 64 * 64 * 128, memory_bytes=2 * 4 * 64 * 128, steps=64),
    )
    assert down.sum_bytes == 4 * 128**2 * 10 / 16
    assert down.rows[0].steps == 128


def test_sweeps_go_over_all_columns_again() -> None:
    swept = with_layers(plan(), scheme=GPTQScheme(group_size=32, refinement_sweeps=2))
    [once] = block_work(plan(), plan().parts[1], ONES).solve[0].rows
    [thrice] = block_work(swept, swept.parts[1], ONES).solve[0].rows
    assert thrice.steps == 3 * once.steps
    assert thrice.float32_flops == 3 * once.float32_flops


def test_slices_add_up_to_their_layer() -> None:
    cut = with_layers(plan(), slices=3)
    rows = block_work(cut, cut.parts[1], ONES).solve[0].rows
    [whole] = block_work(plan(), plan().parts[1], ONES).solve[0].rows
    assert len(rows) == 3
    assert sum(x.float32_flops for x in rows) == pytest.approx(whole.float32_flops)
    assert sum(x.memory_bytes for x in rows) == pytest.approx(whole.memory_bytes)


def test_layers_without_statistics_are_only_rounded() -> None:
    given = plan(scheme=Int8Scheme())
    found = block_work(given, given.parts[1], ONES)
    assert found.forward == found.grams == Work()
    [group] = found.solve
    assert Work.total(group.rows) == Work(rounded_weights=WEIGHTS)
    assert group.shared == Work()


def test_awq_tries_every_exponent_on_the_hessian() -> None:
    given = with_layers(plan(), scheme=AWQScheme(group_size=32, num_grid_points=8))
    [rows] = block_work(given, given.parts[1], ONES).solve[0].rows
    assert rows.float32_flops == 10 * 2 * 64 * 64 * 128


def test_a_plan_for_a_gpu_has_its_micro_batches_and_slices_and_the_sources_16_bits() -> None:
    given = plan()
    halved = tuple(dataclasses.replace(x, source_bytes=x.source_bytes // 2) for x in given.parts)
    bfloat16 = with_layers(dataclasses.replace(given, parts=halved), slices=4)
    found = planned_on(bfloat16, "gpu")
    assert found.tokens is not None
    assert (found.device, found.forward_dtype, found.tokens.micro_batch) == ("gpu", "bfloat16", 8)
    assert found.tokens.attention == "cudnn"
    assert {x.slices for x in found.parts[1].layers} == {1}
    assert block_work(found, found.parts[1], ONES).grams.bfloat16_flops
    assert planned_on(given, "gpu").forward_dtype == "float32"
    assert planned_on(given, "cpu") is given


def test_a_gpus_bands_are_the_solvers() -> None:
    assert path.BAND == GPU_BAND


def test_a_gpu_stacks_the_rows_of_one_input_into_bands_that_are_filled_up() -> None:
    given = planned_on(plan(), "gpu")
    part = given.parts[1]
    wide = tuple(layer(name, 64, rows) for name, rows in (("q", 3000), ("k", 500), ("v", 500)))
    group = InputGroup(targets=("q", "k", "v"), in_features=64, statistics="hessian")
    stacked = planned_on(
        dataclasses.replace(
            plan(), parts=(plan().parts[0], dataclasses.replace(part, layers=wide, groups=(group,)))
        ),
        "gpu",
    )
    # 1504 and 1496 rows of q, each with 500 more.
    [one] = block_work(stacked, stacked.parts[1], ONES).solve
    assert (
        one.rows
        == (Work(float32_flops=2 * 64 * 64 * 2048, memory_bytes=2 * 4 * 64 * 2048, steps=64),) * 2
    )


def test_a_part_is_stored_in_the_bits_of_its_schemes() -> None:
    int8 = block(1, Int8Scheme())
    given = plan(scheme=Int8Scheme())
    # A byte a weight and a float32 scale a channel.
    assert stored_bytes(given, int8) == WEIGHTS + 4 * (128 + 64)


def test_experts_before_others_own_inputs_run_twice_on_cpus_for_the_tokens_they_are_sent() -> None:
    given = experts_plan(16, 64, 32, 4)
    gate_up, down = 16 * 64 * 64, 16 * 32 * 64
    attention = 4 * 16 * 64 * TOKENS
    found = block_work(given, given.parts[1], ONES).forward
    assert found.float32_flops == 2 * 1.5 / 4 * (2 * gate_up + down) * TOKENS + attention
    on_gpu = planned_on(given, "gpu")
    found = block_work(on_gpu, on_gpu.parts[1], ONES).forward
    assert found.float32_flops == 2 * (2 * gate_up + down) * TOKENS + attention


def test_hessians_of_experts_cost_the_rows_that_they_are_sent() -> None:
    given = experts_plan(16, 64, 32, 4)
    found = block_work(given, given.parts[1], ONES).grams
    assert found.float32_flops == 2 * (64**2 + 4 * 32**2) * TOKENS * 10 / 16
    assert found.memory_bytes == 8 * 4 * (64**2 + 16 * 32**2) * 10 / 16


def test_each_expert_with_inputs_of_its_own_has_a_factor_and_ranges_of_them_can_be_anywhere() -> (
    None
):
    given = experts_plan(18, 64, 32, 4)
    gate_up, down = block_work(given, given.parts[1], ONES).solve
    assert gate_up.rows[0].float32_flops == 2 * 64 * 64 * 18 * 64
    assert gate_up.shared.float32_flops == 2 / 3 * 64**3
    assert len(down.rows) == 16
    one = 2 / 3 * 32**3 + 2 * 32 * 32 * 64
    assert [work.float32_flops for work in down.rows] == pytest.approx(
        [one * size for size in (1, 1, 1, 1, 1, 1, 1, 2) * 2]
    )
    assert down.sum_bytes == 4 * 18 * 32**2 * 10 / 16


def test_experts_are_stored_as_floats_beside_their_codes() -> None:
    given = experts_plan(16, 64, 32, 4)
    part = given.parts[1]
    assert stored_bytes(given, part) == part.source_bytes * (1 + (4 + 40 / 32) / 32)


def test_a_gpu_solves_experts_that_share_an_input_in_bands_and_others_in_their_ranges() -> None:
    given = planned_on(experts_plan(16, 64, 32, 4), "gpu")
    gate_up, down = given.parts[1].layers
    assert (gate_up.slices, down.slices) == (1, 16)
    wide = planned_on(experts_plan(16, 64, 2048, 4), "gpu").parts[1].layers[0]
    assert wide.slices == 16 * 4096 // GPU_BAND
