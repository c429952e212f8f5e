"""A worker's sums are found by what they cover, however often and late they are asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.executor.protocol import WorkerLostError
from pipeline.run.worker_api import HeldSum, InputSum
from pipeline.worker.held_sums import HeldSums, LostSumError


def name(start: int, stop: int, *, block: int = 3, stage: int = 1) -> HeldSum:
    return HeldSum(block=block, stage=stage, leaves=range(start, stop))


def ones(leaves: int = 1) -> InputSum:
    return InputSum(
        kind="hessian", arrays=(np.full((2, 2), leaves, np.float32),), num_rows=8 * leaves
    )


def held(*leaves: tuple[int, int]) -> HeldSums:
    sums = HeldSums()
    for start, stop in leaves:
        sums.put(name(start, stop), ones(stop - start))
    return sums


def test_a_merged_sum_takes_the_place_of_both() -> None:
    sums = held((0, 2), (2, 4))
    assert sums.merge(name(0, 2), name(2, 4), None) == name(0, 4)
    assert sums.get(name(0, 4)).num_rows == 32
    assert (sums.get(name(0, 4)).arrays[0] == 4).all()
    for part in (name(0, 2), name(2, 4)):
        with pytest.raises(LostSumError):
            sums.get(part)


def test_a_sum_of_another_worker_is_merged_and_not_held() -> None:
    sums = held((0, 2))
    sent = ones()
    assert sums.merge(name(0, 2), name(2, 3), sent) == name(0, 3)
    assert sums.get(name(0, 3)).num_rows == 24
    assert (sent.arrays[0] == 1).all()
    with pytest.raises(LostSumError):
        sums.get(name(2, 3))


def test_merges_may_be_repeated_whatever_has_come_of_them() -> None:
    sums = held((0, 1), (1, 2))
    for _ in range(2):
        assert sums.merge(name(0, 1), name(1, 2), None) == name(0, 2)
    sums.merge(name(0, 2), name(2, 4), ones(2))
    assert sums.merge(name(0, 1), name(1, 2), None) == name(0, 2)
    assert sums.merge(name(0, 2), name(2, 4), ones(2)) == name(0, 4)
    assert (sums.get(name(0, 4)).arrays[0] == 4).all()


@pytest.mark.parametrize("missing", [(0, 2), (2, 4)])
def test_a_merge_that_lacks_a_sum_says_which_and_loses_none(missing: tuple[int, int]) -> None:
    [there] = {(0, 2), (2, 4)} - {missing}
    sums = held(there)
    with pytest.raises(LostSumError, match=f"shards {missing[0]} to {missing[1] - 1}"):
        sums.merge(name(0, 2), name(2, 4), None)
    assert sums.get(name(*there)).num_rows == 16


def test_a_stage_that_begins_ends_those_before_it_alone() -> None:
    sums = HeldSums()
    for block, stage in ((2, 3), (3, 0), (3, 1)):
        sums.put(name(0, 1, block=block, stage=stage), ones())
    sums.begin(name(0, 1, block=3, stage=0))
    for stage in (0, 1):
        assert sums.get(name(0, 1, stage=stage)).num_rows == 8
    with pytest.raises(LostSumError):
        sums.get(name(0, 1, block=2, stage=3))
    sums.begin(name(0, 1, block=3, stage=1))
    with pytest.raises(LostSumError):
        sums.get(name(0, 1, stage=0))


def test_experts_summed_later_end_those_before_them() -> None:
    sums = HeldSums()
    first, second = (
        dataclasses.replace(name(0, 1), experts=one) for one in (range(2), range(2, 4))
    )
    sums.put(first, ones())
    assert sums.get(sums.put(second, ones())).num_rows == 8
    sums.begin(second)
    assert sums.get(second).num_rows == 8
    with pytest.raises(LostSumError):
        sums.get(first)


def test_a_lost_sum_is_work_that_can_be_done_again() -> None:
    with pytest.raises(WorkerLostError) as raised:
        HeldSums().get(name(4, 6))
    text = "the sum over shards 4 to 5 of block 3's input 1 is needed, but not held here"
    assert str(raised.value) == text
