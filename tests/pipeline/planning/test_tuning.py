"""What training costs, counted on paper: by one worker, however many there are."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.plan import Plan
from pipeline.planning.cost_model import run_cost
from pipeline.planning.estimates import estimate
from pipeline.planning.tuning import trained_windows
from pipeline.recipe.recipe import Calibration, Recipe, Tuning
from quantizer.schemes import Int8Scheme
from tests.pipeline.planning.small_plans import GPTQ, plan, slow_machine, with_layers


def tuned(steps: int, batch: int = 2) -> Plan:
    """Two blocks of 2 × 64 × 128 weights, 8 windows of 16 tokens, the last held back."""
    recipe = Recipe(
        name="small",
        scheme=GPTQ,
        calibration=Calibration(texts=("a",)),
        tuning=Tuning(steps=steps, batch=batch),
    )
    tokens = plan().tokens
    assert tokens is not None
    return dataclasses.replace(
        plan(), recipe=recipe, tokens=dataclasses.replace(tokens, held_back_every=8)
    )


def test_flops_are_three_passes_for_each_window_and_two_to_judge() -> None:
    weights, length = 2 * 64 * 128, 16
    for steps in (1, 10):
        expected = 2 * 2 * weights * length * (3 * steps * 2 + 2)
        assert estimate(tuned(steps), 1).tuning_flops == expected
    assert estimate(plan(), 1).tuning_flops == 0
    assert estimate(with_layers(tuned(5), scheme=Int8Scheme()), 1).tuning_flops == 0


def test_a_step_takes_whole_micro_batches() -> None:
    given = tuned(3, batch=5)
    assert given.tokens is not None
    for micro_batch, windows in ((1, 15), (2, 12), (8, 24)):
        tokens = dataclasses.replace(given.tokens, micro_batch=micro_batch)
        assert trained_windows(dataclasses.replace(given, tokens=tokens)) == windows


def test_one_worker_trains_while_the_others_wait() -> None:
    found = [run_cost(tuned(10), slow_machine(), workers) for workers in (1, 4)]
    one, four = (cost.stage("tune").seconds for cost in found)
    assert one == four > 0
    assert run_cost(tuned(20), slow_machine(), 1).stage("tune").seconds == pytest.approx(
        2 * one, rel=0.05
    )
    assert run_cost(plan(), slow_machine(), 1).stage("tune").seconds == 0


def test_memory_counts_what_is_trained_and_the_windows() -> None:
    """Where that is more than what solving takes."""
    plain, found = estimate(plan(), 1), estimate(tuned(10), 1)
    trained = (7 * 4 + 1) * 2 * 64 * 128
    assert found.worker_bytes - plain.worker_bytes > trained / 2
    assert found.activation_bytes == 2 * plain.activation_bytes
