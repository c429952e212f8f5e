"""A gate passes results that meet all its limits, and names the limits that others exceed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from jobs.catalog.entries import Gate
from jobs.publish.verdict import failures, quality_figures, quality_text
from pipeline.evaluation.answers import Accuracy, TaskFidelity
from pipeline.fidelity import Fidelity, SetFidelity

CAUSAL = Fidelity(
    num_windows=2, count=9, source_perplexity=20.0, result_perplexity=21.0, divergence=0.02,
    agreement=0.9,
)  # fmt: skip
ENCODER = Fidelity(num_windows=2, count=9, cosine=0.99)
HALF, LESS, NONE = (
    Accuracy(acc=acc, acc_stderr=0.05, acc_norm=acc, acc_norm_stderr=0.05)
    for acc in (0.5, 0.45, 0.0)
)
ARC = TaskFidelity(
    name="arc", num_questions=100, truncated=0, source=HALF, result=LESS, flips=7, changed=9,
    recovery=0.9, divergence=0.1,
)  # fmt: skip
TASKS = Fidelity(num_windows=0, count=0, tasks=(ARC,))
UNKNOWING = dataclasses.replace(
    TASKS, tasks=(dataclasses.replace(ARC, source=NONE, recovery=None),)
)
NOVELS = SetFidelity(
    name="novels", num_windows=2, count=9, source_perplexity=40.0, result_perplexity=80.0,
    divergence=0.7, divergence_p99=3.0, agreement=0.6,
)  # fmt: skip
SETS = dataclasses.replace(CAUSAL, sets=(NOVELS,))
NAN = Fidelity(
    num_windows=2, count=9, source_perplexity=20.0, result_perplexity=math.nan, divergence=math.nan
)
BROKEN = dataclasses.replace(NAN, not_finite="values that are not finite in 1 of 2 windows")


def gate(**limits: Any) -> Gate:
    return Gate.model_validate(limits)


@pytest.mark.parametrize(
    ("gate", "fidelity", "said"),
    [
        (None, None, []),
        (None, CAUSAL, []),
        (Gate(max_perplexity_increase=0.05), CAUSAL, []),
        (Gate(max_perplexity_increase=0.04), CAUSAL, ["perplexity 20 → 21, +5.00%, more than +4"]),
        (Gate(max_divergence=0.02), CAUSAL, []),
        (Gate(max_divergence=0.01), CAUSAL, ["divergence 0.02 nats, more than 0.01"]),
        (Gate(max_divergence=0.0, max_perplexity_increase=0.0), CAUSAL, ["perplexity", "diverg"]),
        (Gate(min_cosine=0.99), ENCODER, []),
        (Gate(min_cosine=0.995), ENCODER, ["cosine 0.99000, less than 0.99500"]),
        (Gate(min_cosine=0.9), CAUSAL, ["no cosine is measured of a model of this kind"]),
        (Gate(max_divergence=1.0), ENCODER, ["no divergence is measured"]),
        (Gate(max_perplexity_increase=1.0), ENCODER, ["no perplexity is measured"]),
        (Gate(max_divergence=9.0, max_perplexity_increase=9.0), NAN, ["nan", "nan"]),
        (Gate(max_divergence=9.0, max_perplexity_increase=9.0), BROKEN, ["not finite in 1 of 2"]),
        (None, BROKEN, ["not finite in 1 of 2"]),
        (Gate(min_cosine=0.9), None, ["it was not evaluated; give evaluate_on"]),
        (Gate(min_agreement=0.9), CAUSAL, []),
        (Gate(min_agreement=0.95), CAUSAL, ["same next token 90.00%, less often than 95.00%"]),
        (Gate(min_agreement=0.95), ENCODER, ["no agreement is measured"]),
        (Gate(min_recovery=0.9, max_flips=0.1), TASKS, []),
        (
            Gate(min_recovery=0.99),
            TASKS,
            ["task arc: accuracy 0.5 → 0.45, of 100 questions"],
        ),
        (
            Gate(max_flips=0.05),
            TASKS,
            ["7 of 100 answers flipped between right and wrong: 7."],
        ),
        (Gate(min_recovery=0.9), CAUSAL, ["it was given no tasks"]),
        (Gate(min_recovery=0.9), None, ["it was not evaluated; give tasks"]),
        (Gate(max_divergence=9.0), TASKS, ["it was not evaluated on texts; give evaluate_on"]),
        (Gate(min_recovery=0.9), UNKNOWING, ["the source has no answer right"]),
        (
            Gate(max_perplexity_increase=0.04),
            SETS,
            ["perplexity 20 → 21", "novels: perplexity 40 → 80, +100.00%, more than +4.00%"],
        ),
        (gate(max_divergence=0.02, novels={"max_divergence": 0.7}), SETS, []),
        (gate(novels={"max_divergence": 0.6}), SETS, ["novels: divergence 0.7 nats"]),
        (
            gate(novels={"max_divergence_p99": 2.5}),
            SETS,
            ["novels: divergence 3 nats at the 99th percentile, more than 2.5"],
        ),
        (gate(max_divergence=0.1, novels={"min_agreement": 0.5}), SETS, ["novels: divergence 0"]),
        (gate(novel={"max_divergence": 9.0}), SETS, ["no set of texts named novel is evaluated; "]),
        (Gate(max_divergence_p99=1.0), ENCODER, ["no divergence is measured"]),
    ],
)
def test_exceeded_limits_are_reported(
    gate: Gate | None, fidelity: Fidelity | None, said: list[str]
) -> None:
    found = failures(gate, fidelity)
    assert len(found) == len(said)
    assert all(wanted in text for wanted, text in zip(said, found, strict=True)), found


def test_a_result_s_tasks_stand_beside_its_perplexity() -> None:
    both = dataclasses.replace(CAUSAL, tasks=(ARC,))
    assert quality_text(quality_figures(both)) == "perplexity 20 → 21, arc 0.5 → 0.45"
    assert quality_text(quality_figures(TASKS)) == "arc 0.5 → 0.45"
    found = quality_figures(SETS)
    assert quality_text(found) == "perplexity 20 → 21, novels perplexity 40 → 80"
    assert found is not None
    assert Fidelity.from_figures(found) == SETS


def test_nan_is_written_as_null() -> None:
    found = quality_figures(NAN)
    assert found is not None
    assert found["result_perplexity"] is None
    assert found["source_perplexity"] == 20.0
    assert quality_figures(None) is None


def test_values_that_are_not_finite_are_kept_with_the_figures_and_otherwise_not_mentioned() -> None:
    found, finite = quality_figures(BROKEN), quality_figures(CAUSAL)
    assert found is not None
    assert finite is not None
    assert "not_finite" not in finite
    assert quality_text(found) == "not finite"
    # What is read back is judged alike.
    assert failures(None, Fidelity(**found)) == failures(None, BROKEN)


def test_each_set_may_have_a_line_of_its_own() -> None:
    text = quality_text(quality_figures(dataclasses.replace(SETS, tasks=(ARC,))), between="\n")
    assert text.splitlines() == [
        "perplexity 20 → 21",
        "novels perplexity 40 → 80",
        "arc 0.5 → 0.45",
    ]
