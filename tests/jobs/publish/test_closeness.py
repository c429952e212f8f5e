"""How close a result is to its gate agrees with whether it passes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from jobs.catalog.entries import Gate
from jobs.publish.closeness import closest
from jobs.publish.verdict import failures
from pipeline.evaluation.answers import Accuracy, TaskFidelity
from pipeline.fidelity import Fidelity, SetFidelity


def text(scale: float) -> dict[str, float]:
    return {
        "source_perplexity": 20.0,
        "result_perplexity": 20.0 * (1 + 0.05 * scale),
        "divergence": 0.1 * scale,
        "divergence_p99": 2.0 * scale,
        "agreement": 1 - 0.2 * scale,
    }


def accuracy(share: float) -> Accuracy:
    return Accuracy(acc=share, acc_stderr=None, acc_norm=share, acc_norm_stderr=None)


def task(scale: float) -> TaskFidelity:
    recovery = 1 - 0.1 * scale
    return TaskFidelity(
        name="quiz", num_questions=100, truncated=0, source=accuracy(0.5),
        result=accuracy(0.5 * recovery), flips=int(30 * scale), changed=0, recovery=recovery,
        divergence=0.0,
    )  # fmt: skip


LIMITS = {
    "max_perplexity_increase": 0.05,
    "max_divergence": 0.1,
    "max_divergence_p99": 2.0,
    "min_agreement": 0.8,
    "min_recovery": 0.9,
    "max_flips": 0.3,
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9, 1.1, 3.0])
def test_more_is_used_than_allowed_exactly_where_a_gate_fails(limit: str, scale: float) -> None:
    gate = Gate.model_validate({limit: LIMITS[limit]})
    found = Fidelity(num_windows=1, count=1, **text(scale), tasks=(task(scale),))
    one = closest(gate, found)
    assert one is not None
    assert one.used == pytest.approx(scale, abs=0.02)
    assert (one.used > 1) == bool(failures(gate, found))


def test_the_closest_of_all_sets_and_limits_is_named() -> None:
    gate = Gate.model_validate({**LIMITS, "code": {"max_divergence": 0.04}})
    code = SetFidelity(name="code", num_windows=1, count=1, **text(0.3))
    found = Fidelity(num_windows=1, count=1, **text(0.5), sets=(code,))
    one = closest(gate, found)
    assert one is not None
    assert one.figure == "code divergence"
    assert one.used == pytest.approx(0.75)


def test_encoders_are_judged_by_their_cosine() -> None:
    one = closest(Gate(min_cosine=0.9), Fidelity(num_windows=1, count=1, cosine=0.95))
    assert one is not None
    assert one.figure == "cosine"
    assert one.used == pytest.approx(0.5)


def test_a_limit_that_allows_nothing_is_kept_or_exceeded_and_nothing_in_between() -> None:
    gate = Gate(max_divergence=0.0)
    for divergence, used in ((0.0, 0.0), (1e-9, math.inf)):
        one = closest(gate, Fidelity(num_windows=1, count=1, divergence=divergence))
        assert one is not None
        assert one.used == used


@pytest.mark.parametrize("limit", [{"min_cosine": 0.9}, {"min_recovery": 0.9}])
def test_a_figure_that_was_not_measured_exceeds_its_limit(limit: dict[str, float]) -> None:
    gate = Gate.model_validate({"max_divergence": 0.1, **limit})
    asked = dataclasses.replace(task(0.5), recovery=None)
    found = Fidelity(num_windows=1, count=1, **text(0.5), tasks=(asked,))
    assert failures(gate, found)
    one = closest(gate, found)
    assert one is not None
    assert one.used == math.inf


def test_without_gate_or_figures_nothing_is_close() -> None:
    empty = Fidelity(num_windows=0, count=0)
    for gate, found in itertools.product((None, Gate(max_divergence=0.1)), (None, empty)):
        assert closest(gate, found) is None
    broken = Fidelity(num_windows=1, count=1, not_finite="values that are not finite")
    one = closest(Gate(max_divergence=0.1), broken)
    assert one is not None
    assert one.used == math.inf
