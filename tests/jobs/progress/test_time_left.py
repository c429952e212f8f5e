"""The time left is the cost model's, corrected by what blocks took."""

import pytest

from jobs.progress.time_left import (
    Expected,
    correction,
    expected,
    seconds_a_block,
    seconds_left,
)
from pipeline.executor.protocol import Allocation
from tests.pipeline.tiny_runs import planned

MODEL = Expected(part_seconds=(9.0, 1.0, 2.0, 4.0), compile_seconds=10.0, finish_seconds=0.5)


def test_blocks_that_take_k_times_longer_leave_k_times_as_much() -> None:
    measured = {0: 70.0, 1: 100.0, 2: 6.0}
    assert correction(MODEL, measured) == 3.0
    assert seconds_left(MODEL, measured, [3], since=0.0) == 3.0 * 4.5
    assert seconds_a_block(measured) == 6.0


def test_the_first_block_compiles_and_counts_only_while_it_is_the_only_one() -> None:
    assert correction(MODEL, {0: 70.0, 1: 22.0}) == 2.0
    assert seconds_left(MODEL, {0: 70.0, 1: 22.0}, [2, 3], since=0.0) == 2.0 * 6.5


def test_nothing_is_promised_before_a_block_unless_the_machine_is_known() -> None:
    assert seconds_left(MODEL, {}, [0, 1, 2, 3], since=0.0) is None
    assert seconds_left(MODEL, {0: 70.0}, [1, 2, 3], since=0.0) is None
    known = Expected(**{**vars(MODEL), "is_of_machine": True})
    assert seconds_left(known, {}, [0, 1, 2, 3], since=0.0) == 26.5


def test_time_passes_but_a_late_block_does_not_eat_those_after_it() -> None:
    measured = {1: 11.0, 2: 2.0}
    before, after, late = (seconds_left(MODEL, measured, [3], since=s) for s in (0.0, 1.0, 60.0))
    assert before is not None
    assert after == before - 1.0
    assert late == 0.5  # what comes after the blocks


def test_a_finished_run_needs_nothing_more_than_its_end() -> None:
    assert seconds_left(MODEL, {1: 11.0, 2: 2.0, 3: 4.0}, [], since=0.1) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("allocation", "is_of_machine"),
    [
        (Allocation(workers=2, threads=2), False),
        (Allocation(workers=2, threads=2, gpus=4, accelerator="H100"), True),
        (Allocation(workers=1, threads=2, gpus=1, accelerator="a kind to come"), False),
    ],
    ids=["CPUs", "known GPUs", "unknown GPUs"],
)
def test_every_part_of_a_plan_is_expected_to_take_some_time(
    allocation: Allocation, is_of_machine: bool
) -> None:
    for scheme in ("gptq", "int8"):
        plan = planned(scheme).plan
        found = expected(plan, allocation)
        assert len(found.part_seconds) == len(plan.parts)
        assert min(found.part_seconds) > 0
        assert found.is_of_machine == is_of_machine
