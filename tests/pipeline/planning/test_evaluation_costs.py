"""A GPU has room for an evaluation, for fewer windows at once, or for none: planned, not tried."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation.batches import TOKENS_PER_PASS, EvaluationSet
from pipeline.plan import Plan
from pipeline.planning.evaluation_costs import EvaluationMemory
from tests.pipeline.tiny_runs import planned


def windows(length: int) -> EvaluationSet:
    return EvaluationSet(
        windows=TokenWindows(
            tokens=np.zeros((2, length), np.int32),
            lengths=np.full(2, length, np.int32),
            fingerprint="",
            num_documents=1,
        )
    )


def of_vocabulary(size: int) -> Plan:
    """A plan whose table holds so many tokens."""
    plan = planned("int8").plan
    rest = plan.parts[0]
    layers = tuple(dataclasses.replace(layer, out_features=size) for layer in rest.layers)
    rest = dataclasses.replace(rest, layers=layers)
    rest = dataclasses.replace(rest, source_bytes=4 * rest.num_weights)
    return dataclasses.replace(plan, parts=(rest, *plan.parts[1:]))


def test_logits_of_one_window_by_both_models_are_counted() -> None:
    small, large = (EvaluationMemory.of(of_vocabulary(n), windows(4096)) for n in (300, 128256))
    # In float32, as this source is: both models', and one as it is made.
    assert large.logits_bytes == 3 * 4096 * 128256 * 4
    assert large.least_bytes - small.least_bytes > 0.8 * large.logits_bytes
    assert large.token_bytes == small.token_bytes


def test_as_many_tokens_pass_as_have_room_and_no_more_than_ever() -> None:
    needed = EvaluationMemory.of(of_vocabulary(300), windows(64))
    assert needed.batch_tokens == 128
    assert needed.tokens_per_pass(needed.least_bytes) == 128
    assert needed.tokens_per_pass(needed.least_bytes - 1) < 128
    assert needed.tokens_per_pass(needed.fixed_bytes + 1000 * needed.token_bytes) == 1000
    assert needed.tokens_per_pass(1 << 50) == TOKENS_PER_PASS
    assert needed.tokens_per_pass(0) == 0


def test_attention_that_keeps_no_scores_needs_none() -> None:
    plan = planned("gptq").plan
    assert plan.tokens is not None
    tokens = dataclasses.replace(plan.tokens, attention="cudnn", largest_array_bytes=1 << 20)
    scores, none = (
        EvaluationMemory.of(dataclasses.replace(plan, tokens=x), windows(8192))
        for x in (plan.tokens, tokens)
    )
    assert scores.least_bytes > 2 * 8192**2 * 4 > 2 * (none.least_bytes - (512 << 20))
