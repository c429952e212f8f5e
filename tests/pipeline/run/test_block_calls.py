"""The layers of one input are shared out whole or by slices, each once and evenly."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.plan import LayerPlan
from pipeline.recipe.recipe import Calibration, Recipe, Tuning
from pipeline.run.block_calls import BlockCalls, share_out
from pipeline.run.solved_layers import SolvedLayer
from quantizer.schemes import GPTQScheme, Int8Scheme
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.planning.small_plans import GPTQ, plan, with_layers


def layers(*rows_and_slices: tuple[int, int]) -> list[LayerPlan]:
    return [
        LayerPlan(
            path=f"layer-{i}",
            name=f"layer-{i}",
            kind="kernel",
            in_features=64,
            out_features=rows,
            scheme=GPTQScheme(),
            slices=slices,
        )
        for i, (rows, slices) in enumerate(rows_and_slices)
    ]


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_every_slice_has_one_worker_and_all_have_about_the_same(workers: int) -> None:
    given = layers((4096, 8), (1024, 2), (1024, 2), (300, 1))
    whole, cut = share_out(given, workers)
    slices = {layer.path: layer.slices for layer in given}
    done = [(path, n) for one in cut for path in one for n in one[path]]
    done += [(path, n) for one in whole for path in one for n in range(slices[path])]
    assert sorted(done) == sorted((path, n) for path in slices for n in range(slices[path]))
    assert not any(len(one[path]) == slices[path] for one in cut for path in one)
    rows = {layer.path: layer.out_features / layer.slices for layer in given}
    loads = [
        sum(rows[path] * slices[path] for path in alone)
        + sum(rows[path] * len(part[path]) for path in part)
        for alone, part in zip(whole, cut, strict=True)
    ]
    assert max(loads) - min(loads) <= 512
    if workers == 1:
        assert cut == [{}]


def test_a_block_with_nothing_to_train_sends_no_windows() -> None:
    recipe = Recipe(
        name="small", scheme=GPTQ, calibration=Calibration(texts=("a",)), tuning=Tuning()
    )
    given = with_layers(dataclasses.replace(plan(), recipe=recipe), scheme=Int8Scheme())
    solved = [[SolvedLayer(path="up", variables={}, report={})]]
    # These workers have no method to call.
    calls = BlockCalls(given, LocalExecutor([object(), object()]), [[range(2)], [range(2, 4)]])
    assert calls.tune(0, {}, solved) == solved
