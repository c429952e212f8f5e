"""Counted work at a machine's rates: what adds up, what workers share, and what is hidden."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.planning.cost_model import run_cost
from pipeline.planning.evaluation_costs import Evaluated
from pipeline.planning.machines import known_machines
from pipeline.planning.run_cost import STAGES, RunCost, Stage, resource_seconds
from pipeline.planning.stage_constants import CONSTANTS
from pipeline.planning.work import Work, block_work, planned_on
from quantizer.schemes import Int8Scheme
from tests.pipeline.planning.small_plans import plan, slow_machine, with_layers

EVALUATED = Evaluated(num_windows=4, sequence_length=16)


def seconds(cost: RunCost, stage: Stage) -> float:
    return cost.stage(stage).seconds


def test_seconds_are_work_over_rates_and_add_up() -> None:
    machine = slow_machine(memory_achievable=0.5, float32_flops=2e6, network_bytes_per_second=5e5)
    work = Work(float32_flops=1e6, memory_bytes=1e6, steps=7, network_bytes=1e6, seconds=3)
    assert resource_seconds(work, machine) == {
        "float32 products": 0.5,
        "memory": 2.0,
        "launches": pytest.approx(0.007),
        "network": 2.0,
        "fixed": 3.0,
    }


def test_one_worker_does_all_of_the_counted_work() -> None:
    given, machine = plan(), slow_machine()
    cost = run_cost(given, machine, 1)
    found = block_work(given, given.parts[1], CONSTANTS["cpu"])
    for stage, work in (
        ("forward", found.forward),
        ("grams", found.grams),
        ("decode", found.decode),
        ("solve", Work.total([g.shared + Work.total(g.rows) for g in found.solve])),
    ):
        expected = 2 * sum(resource_seconds(work, machine).values())
        assert seconds(cost, stage) == pytest.approx(expected), stage  # type: ignore[arg-type]
    assert cost.seconds == pytest.approx(sum(seconds(cost, stage) for stage in STAGES))
    assert seconds(cost, "evaluate") == 0


def test_the_resource_that_takes_most_bounds_a_stage() -> None:
    assert run_cost(plan(), slow_machine(), 1).stage("grams").bound == "float32 products"
    dear = slow_machine(float32_flops=1e12)
    assert run_cost(plan(), dear, 1).stage("grams").bound == "memory"


def test_workers_share_shards_and_rows_but_not_the_factor() -> None:
    given = with_layers(plan(), slices=4)
    one, two, four = (run_cost(given, slow_machine(), n, evaluated=EVALUATED) for n in (1, 2, 4))
    for stage in ("forward", "grams"):
        assert seconds(two, stage) == pytest.approx(seconds(one, stage) / 2)
        assert seconds(four, stage) == pytest.approx(seconds(one, stage) / 4)
    found = block_work(given, given.parts[1], CONSTANTS["cpu"])
    factor = sum(sum(resource_seconds(g.shared, slow_machine()).values()) for g in found.solve)
    rows = seconds(one, "solve") / 2 - factor
    assert seconds(four, "solve") == pytest.approx(2 * (factor + rows / 4))


def test_no_more_workers_than_shards_help_the_forward_pass() -> None:
    four, eight = (run_cost(plan(), slow_machine(), n) for n in (4, 8))
    assert seconds(four, "forward") == seconds(eight, "forward")


@pytest.mark.parametrize("stage", ["plan", "forward", "grams", "solve", "evaluate"])
def test_more_workers_are_never_slower_in_what_they_share(stage: Stage) -> None:
    given = with_layers(plan(num_blocks=3), slices=3)
    taken = [
        seconds(run_cost(given, slow_machine(), workers, evaluated=EVALUATED), stage)
        for workers in range(1, 9)
    ]
    assert taken == sorted(taken, reverse=True)


def test_sums_and_weights_travel_only_between_workers() -> None:
    quick_calls = slow_machine(network_bytes_per_second=1e3)
    one, two, three = (run_cost(plan(), quick_calls, n).stage("exchange") for n in (1, 2, 3))
    assert one.bound == "fixed"
    assert two.bound == three.bound == "network"
    assert one.seconds < two.seconds < three.seconds
    on_one_node = quick_calls.model_copy(update={"workers_per_node": 2})
    assert run_cost(plan(), on_one_node, 2).stage("exchange").seconds < two.seconds


def test_gpus_of_one_worker_copy_sums_to_each_other_and_share_a_factor() -> None:
    h100 = known_machines().named("H100")
    given = with_layers(plan(), out_features=1 << 14)
    apart, together = (run_cost(given, h100, 4, together=n, evaluated=EVALUATED) for n in (1, 4))
    assert apart.worker_hours / apart.seconds == together.worker_hours / together.seconds
    for stage in ("solve", "evaluate"):
        alone = seconds(run_cost(given, h100, 1, evaluated=EVALUATED), stage)  # type: ignore[arg-type]
        assert seconds(together, stage) < alone, stage  # type: ignore[arg-type]
    assert seconds(together, "exchange") < seconds(apart, "exchange")
    # Without NVLink over the host's bus, with slower links slower.
    unlinked = h100.model_copy(update={"peer_bytes_per_second": None})
    slow = h100.model_copy(update={"peer_bytes_per_second": 1e6})
    assert unlinked.between_gpus == h100.transfer_bytes_per_second * h100.transfer_achievable
    assert h100.between_gpus > unlinked.between_gpus
    exchanged = run_cost(given, slow, 4, together=4).stage("exchange")
    assert exchanged.bound == "between GPUs"
    on_gpu = planned_on(given, "gpu")
    groups = block_work(on_gpu, on_gpu.parts[1], CONSTANTS["gpu"]).solve
    # Two levels of the tree, and three copies of the factor and the Hessian, for each block.
    copied = 2 * sum(2 * group.sum_bytes + 3 * group.shared_bytes for group in groups)
    link = slow.between_gpus
    assert exchanged.seconds == pytest.approx(
        copied / link + seconds(run_cost(given, h100, 1), "exchange"), rel=1e-3
    )


def test_reading_and_committing_hide_behind_the_blocks() -> None:
    busy = run_cost(plan(num_blocks=4), slow_machine(), 1)
    for stage in ("read", "commit"):
        assert busy.stage(stage).hidden_seconds > 0
    # Where storage is the slowest, it is waited for, and the whole takes as long.
    idle = run_cost(plan(num_blocks=4), slow_machine(storage_bytes_per_second=100.0), 1)
    assert seconds(idle, "read") > 10 * seconds(busy, "read")
    reads = sum(part.source_bytes for part in plan(num_blocks=4).parts)
    assert seconds(idle, "read") + idle.stage("read").hidden_seconds >= reads / 100


@pytest.mark.parametrize("workers", [1, 3])
def test_what_parts_take_is_what_lies_between_planning_and_the_end(workers: int) -> None:
    given = with_layers(plan(num_blocks=3), slices=3)
    for one in (given, dataclasses.replace(given, tokens=None)):
        found = run_cost(one, slow_machine(), workers, keep_every=2)
        beside = sum(seconds(found, stage) for stage in ("start", "compile", "plan", "finish"))
        assert len(found.part_seconds) == len(given.parts)
        assert sum(found.part_seconds) == pytest.approx(found.seconds - beside)


def test_parts_that_need_no_calibration_are_made_in_waves() -> None:
    given = plan(num_blocks=5, scheme=Int8Scheme())
    one, three, six = (run_cost(given, slow_machine(), n) for n in (1, 3, 6))
    assert seconds(one, "forward") == seconds(one, "grams") == 0
    assert seconds(one, "solve") > 0
    assert one.seconds > three.seconds > six.seconds


def test_workers_hours_and_price_follow_from_the_seconds() -> None:
    cost = run_cost(plan(), slow_machine(price_per_hour=2.0), 4)
    assert cost.worker_hours == pytest.approx(4 * cost.seconds / 3600)
    assert cost.price == pytest.approx(2 * cost.worker_hours)
    assert run_cost(plan(), slow_machine(), 4).price is None


def test_the_same_plan_costs_the_same_again() -> None:
    first, second = (run_cost(plan(), slow_machine(), 2).to_dict() for _ in range(2))
    assert first == second


def test_activations_that_a_gpu_cannot_hold_travel_at_every_stage() -> None:
    h100 = known_machines().named("H100")
    given = plan()
    small = h100.model_copy(update={"memory_bytes": 1e6})
    assert seconds(run_cost(given, small, 1), "forward") > seconds(
        run_cost(given, h100, 1), "forward"
    )


def test_evaluating_counts_the_head_and_both_models() -> None:
    endless = dict.fromkeys(
        ("storage_bytes_per_second", "host_hash_bytes_per_second", "host_bytes_per_second"), 1e15
    )
    given, machine = plan(), slow_machine(**endless)
    wider = dataclasses.replace(
        given,
        parts=(
            dataclasses.replace(
                given.parts[0],
                layers=tuple(
                    dataclasses.replace(x, out_features=2000) for x in given.parts[0].layers
                ),
                source_bytes=2 * given.parts[0].source_bytes,
            ),
            *given.parts[1:],
        ),
    )
    taken = [
        seconds(run_cost(x, machine, 1, evaluated=EVALUATED), "evaluate") for x in (given, wider)
    ]
    assert taken[1] - taken[0] == pytest.approx(2 * 2 * 64 * 1000 * 4 * 16 / 1e6, rel=1e-3)
