"""A composition's work, counted: blocks and layers of all runs, results compared, files copied."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.plan import Plan
from pipeline.planning.composition_cost import composition_cost, num_units
from pipeline.planning.evaluation_costs import Evaluated
from pipeline.planning.run_cost import RunCost, resource_seconds
from pipeline.planning.stage_constants import CONSTANTS
from pipeline.planning.stored_sizes import stored_bytes
from pipeline.planning.work import Work, block_work, forward_work
from quantizer.schemes import Int8Scheme
from tests.pipeline.planning.small_plans import GPTQ, plan, slow_machine

TEXT = Evaluated(num_windows=4, sequence_length=16)


def runs(number: int, num_blocks: int = 2) -> list[Plan]:
    schemes = [
        GPTQ,
        dataclasses.replace(GPTQ, weight_bits=3),
        dataclasses.replace(GPTQ, weight_bits=2),
    ]
    return [plan(num_blocks, scheme) for scheme in schemes[:number]]


def cost(plans: list[Plan], workers: int = 1, **given: Any) -> RunCost:
    asked = {"measured": TEXT, "judged": TEXT, "num_fitting": 1, "by_layers": False, **given}
    return composition_cost(plans, slow_machine(), workers, **asked)


def evaluating(found: RunCost) -> float:
    return found.stage("evaluate").seconds


def test_by_layers_each_unit_of_each_run_passes_its_block() -> None:
    plans = runs(3)
    more = evaluating(cost(plans, by_layers=True)) - evaluating(cost(plans))
    # Beside which another choice is compared.
    more -= evaluating(cost(plans, num_fitting=2)) - evaluating(cost(plans))
    tokens = TEXT.as_tokens(plans[0], TEXT.num_windows)
    constants = CONSTANTS["cpu"]
    expected = Work()
    for number in (1, 2):
        part = plans[0].parts[number]
        once = forward_work(plans[0], part, tokens, constants)
        read = 2 * part.source_bytes + sum(stored_bytes(one, one.parts[number]) for one in plans)
        expected += once * (2 + 2 * len(plans))  # two inputs, and so two units, of each run
        expected += block_work(plans[0], part, constants).decode * len(plans)
        expected += Work(storage_bytes=read, hash_bytes=read, host_bytes=2 * read)
    assert more == pytest.approx(sum(resource_seconds(expected, slow_machine()).values()))


def test_units_are_those_of_any_run_that_calibrates() -> None:
    gptq = runs(1)[0]
    int8 = plan(2, Int8Scheme())
    part = gptq.parts[1]
    together = dataclasses.replace(part.groups[0], targets=("up", "down"))
    fused = dataclasses.replace(
        gptq, parts=(gptq.parts[0], dataclasses.replace(part, groups=(together,)), gptq.parts[2])
    )
    assert num_units([int8], int8, 1) == 2
    assert num_units([fused, int8], int8, 1) == num_units([fused, int8], fused, 1) == 1
    assert num_units([fused, int8], int8, 2) == 2
    in_float = plan(2, None)
    assert num_units([fused, in_float], in_float, 1) == 0
    experts = tuple(dataclasses.replace(x, experts=4, experts_per_token=2) for x in part.layers)
    bank = dataclasses.replace(
        gptq, parts=(gptq.parts[0], dataclasses.replace(part, layers=experts), gptq.parts[2])
    )
    assert num_units([bank], bank, 1) == 1


def test_more_runs_and_layers_cost_more_and_workers_share_what_is_measured() -> None:
    two, three = cost(runs(2)), cost(runs(3))
    assert three.stage("evaluate").seconds > two.stage("evaluate").seconds
    by_layers = cost(runs(2), by_layers=True)
    for stage in ("evaluate", "read", "commit"):
        assert by_layers.stage(stage).seconds > two.stage(stage).seconds  # type: ignore[arg-type]
    for layers in (False, True):
        both, alone = (cost(runs(2), n, by_layers=layers) for n in (2, 1))
        assert evaluating(both) < evaluating(alone)


def test_copying_reads_what_the_runs_stored() -> None:
    plans = runs(2)
    stored = sum(stored_bytes(plans[0], part) for part in plans[0].parts)
    read = Work(storage_bytes=stored, hash_bytes=stored, host_bytes=2 * stored)
    expected = sum(resource_seconds(read, slow_machine()).values())
    assert cost(plans).stage("read").seconds == pytest.approx(expected)
