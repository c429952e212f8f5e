"""Layers that read one input stay together; whole blocks cost and take what they do as blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache

import pytest

from pipeline.composition.composed_plan import GivenRun, part_bytes
from pipeline.composition.layer_choice import LayerChoices, units_of
from pipeline.composition.layer_errors import LayerErrors
from pipeline.composition.sensitivities import Sensitivity
from pipeline.recipe.recipe import Tuning
from pipeline.run.worker_api import LayersAlone
from tests.pipeline.composition.test_composed_plan import given, with_bits
from tests.pipeline.tiny_runs import planned

NUM_BLOCKS = 2


@cache
def runs() -> tuple[GivenRun, ...]:
    """Whose blocks take 1,000 and 2,005 bytes."""
    plan = planned("gptq").plan
    found = []
    for name, one, size in (("w4", plan, 2005), ("w2", with_bits(plan, 2), 1000)):
        run = given(one, name)
        records = tuple(dataclasses.replace(x, size_bytes=size) for x in run.records)
        found.append(dataclasses.replace(run, records=records))
    return tuple(found)


def paths(block: int) -> tuple[tuple[str, ...], ...]:
    """A block's layers as units of two inputs each."""
    layers = [x.path for x in runs()[0].plan.parts[block + 1].layers]
    assert len(layers) == 7
    return tuple(tuple(layers[a:b]) for a, b in itertools.pairwise((0, 3, 4, 6, 7)))


def sensitivity(run: GivenRun, block: int, cost: float | None) -> Sensitivity:
    return Sensitivity(
        part=block + 1,
        weights_sha256=run.records[block + 1].sha256,
        source_sha256=run.plan.source_digest,
        windows_sha256="0" * 64,
        num_windows=2,
        count=10,
        figure="divergence",
        cost=cost,
        standard_error=None,
    )


def errors(
    run: GivenRun, block: int, each: Sequence[float | None], sizes: Sequence[int]
) -> LayerErrors:
    return LayerErrors(
        part=block + 1,
        weights_sha256=run.records[block + 1].sha256,
        source_sha256=run.plan.source_digest,
        windows_sha256="0" * 64,
        units=tuple(
            LayersAlone(layers=unit, error=error, num_tokens=9, stored_bytes=size)
            for unit, error, size in zip(paths(block), each, sizes, strict=True)
        ),
    )


COSTS = ((0.25, 1.0), (0.5, 3.0))
EACH = ((1.0, 2.0, 3.0, 2.0), (4.0, 0.0, 2.0, 2.0))
SIZES = ((400, 300, 500, 700), (200, 100, 300, 300))


def measured(
    costs: Sequence[Sequence[float | None]] = COSTS,
) -> tuple[list[list[Sensitivity]], list[list[LayerErrors]]]:
    blocks = range(NUM_BLOCKS)
    return (
        [[sensitivity(r, b, c) for r, c in zip(runs(), costs[b], strict=True)] for b in blocks],
        [[errors(run, b, EACH[n], SIZES[n]) for n, run in enumerate(runs())] for b in blocks],
    )


def test_one_runs_layers_cost_and_take_what_its_blocks_do() -> None:
    sensitivities, found = measured()
    for block in range(NUM_BLOCKS):
        units = units_of(runs(), block, sensitivities[block], found[block])
        assert [unit.layers for unit in units] == list(paths(block))
        for number, run in enumerate(runs()):
            own = [unit.options[number] for unit in units]
            assert sum(one.cost for one in own) == pytest.approx(COSTS[block][number])
            assert sum(one.size_bytes for one in own) == part_bytes(run.records[block + 1])
    shares = [x.options[1].cost for x in units_of(runs(), 0, sensitivities[0], found[0])]
    assert shares == [0.5, 0.0, 0.25, 0.25]


@pytest.mark.parametrize("most_bytes", range(1_950, 4_100, 150))
def test_it_is_the_best_of_all_choices_of_layers(most_bytes: int) -> None:
    sensitivities, found = measured()
    units = [
        unit
        for block in range(NUM_BLOCKS)
        for unit in units_of(runs(), block, sensitivities[block], found[block])
    ]
    every = [
        (sum(x.cost for x in picked), sum(x.size_bytes for x in picked))
        for picked in itertools.product(*(unit.options for unit in units))
    ]
    fitting = [cost for cost, size in every if size <= most_bytes]
    choice = LayerChoices(runs(), sensitivities, found).within(most_bytes)
    if not fitting:
        assert choice is None
        return
    assert choice is not None
    assert choice.size_bytes <= most_bytes
    assert choice.cost == pytest.approx(min(fitting))
    named = {path for one in choice.layers for path in one.layers}
    for block in range(NUM_BLOCKS):
        for unit in paths(block):
            assert len(named.intersection(unit)) in (0, len(unit))
        others = [one for one in choice.layers if one.block == block]
        assert all(one.run != choice.picked[block] for one in others)


def test_blocks_that_were_trained_or_give_no_finite_answers_are_not_split() -> None:
    sensitivities, found = measured([[None, 1.0], [0.5, 3.0]])
    [first, *others] = units_of(runs(), 0, sensitivities[0], found[0])
    assert first.runs == (1,)
    assert len(others) == 3
    tuning = Tuning(steps=10)
    recipe = runs()[0].plan.recipe.model_copy(update={"tuning": tuning})
    plan = dataclasses.replace(runs()[0].plan, recipe=recipe)
    tuned = (dataclasses.replace(runs()[0], plan=plan), runs()[1])
    broken = [errors(run, 1, (1.0, None, 1.0, 1.0), SIZES[n]) for n, run in enumerate(runs())]
    for given_runs, of_block in ((tuned, found[1]), (runs(), broken)):
        [whole] = units_of(given_runs, 1, sensitivities[1], of_block)
        assert [x.size_bytes for x in whole.options] == [2005, 1000]
        assert [x.cost for x in whole.options] == [0.5, 3.0]
        assert set(whole.layers) == {path for unit in paths(1) for path in unit}
