"""A task's figures are those of lm-evaluation-harness, and say what the result loses."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import chain

import numpy as np
import pytest

from pipeline.evaluation.answers import ChoiceLikelihood, TaskFidelity
from pipeline.evaluation.choices import TaskRows
from pipeline.fidelity import Fidelity, average

# Of four questions with two, three, two and two choices: log-likelihoods and right answers.
SOURCE = [[-1.0, -2.0], [-4.0, -3.0, -9.0], [-1.0, -5.0], [-2.0, -1.0]]
RESULT = [[-1.1, -2.0], [-2.0, -3.0, -9.0], [-6.0, -5.0], [-2.0, -2.5]]
ANSWERS = [0, 1, 0, 0]
# The longer a choice, the less each of its characters costs.
CHARACTERS = [1, 4, 8, 1, 1, 1, 1, 2, 2]


def rows(answers: list[int] = ANSWERS) -> TaskRows:
    return TaskRows(
        name="some",
        sha256="0" * 64,
        rows=(np.arange(3, dtype=np.int32),) * 9,
        scored=np.ones(9, np.int32),
        characters=np.array(CHARACTERS, np.int32),
        num_choices=np.array([2, 3, 2, 2], np.int32),
        answers=np.array(answers, np.int32),
        truncated=1,
        most=100,
    )


def likelihoods() -> list[ChoiceLikelihood]:
    pairs = zip(chain.from_iterable(SOURCE), chain.from_iterable(RESULT), strict=True)
    return [ChoiceLikelihood(source=p, result=q) for p, q in pairs]


def test_accuracies_and_their_errors_are_lm_eval_s() -> None:
    found = TaskFidelity.of(rows(), likelihoods())
    assert found.source.acc == 0.75  # the last is wrong
    assert found.result.acc == 0.5  # the second and third are wrong, the last has become right
    assert found.source.acc_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    # Per character: -1 against -0.5, -0.5 against -3 and -9, -1 against -5, -1 against -0.5.
    assert found.source.acc_norm == 0.25
    assert (found.num_questions, found.truncated) == (4, 1)


def test_a_likelihood_that_is_no_number_answers_nothing() -> None:
    broken = [dataclasses.replace(one, source=math.nan) for one in likelihoods()]
    found = TaskFidelity.of(rows(), broken)
    assert found.source.acc == found.source.acc_norm == 0
    assert found.recovery is None
    assert found.changed == 4


def test_flips_are_of_rightness_and_changes_of_answers() -> None:
    found = TaskFidelity.of(rows(), likelihoods())
    assert found.flips == 3
    assert found.changed == 3
    assert found.recovery == pytest.approx(0.5 / 0.75)
    # Where the second question's right answer is the one that both find least likely, a wrong
    # answer takes the place of another.
    found = TaskFidelity.of(rows([0, 2, 0, 0]), likelihoods())
    assert (found.flips, found.changed) == (2, 3)


def test_the_divergence_is_of_the_distributions_over_choices() -> None:
    expected = []
    for log_p, log_q in zip(SOURCE, RESULT, strict=True):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array(log_p), np.array(log_q)))
        expected.append(float(np.sum(p * np.log(p / q))))
    found = TaskFidelity.of(rows(), likelihoods())
    assert found.divergence == pytest.approx(np.mean(expected))


def test_nothing_is_recovered_of_a_source_that_knows_nothing() -> None:
    assert TaskFidelity.of(rows([1, 2, 1, 0]), likelihoods()).recovery is None


def test_figures_survive_storage_and_are_left_out_where_there_are_none() -> None:
    found = average([], [(rows(), likelihoods())])
    figures = json.loads(json.dumps(found.figures()))
    assert Fidelity.from_figures(figures) == found
    assert figures["tasks"][0]["source"]["acc"] == 0.75
    assert "divergence_p99" not in figures
    without = Fidelity(num_windows=1, count=3, cosine=0.5)
    assert "tasks" not in without.figures()
    assert Fidelity.from_figures(without.figures()) == without


def test_choices_that_are_not_finite_are_named() -> None:
    broken = [
        dataclasses.replace(one, result=math.nan, result_broken_at="block 1 (layer_1)")
        if number == 4
        else one
        for number, one in enumerate(likelihoods())
    ]
    found = average([], [(rows(), broken)])
    assert found.not_finite is not None
    assert "1 of 9 choices of some; in choice 4 they first appear in block 1" in found.not_finite
    assert found.figures()["tasks"][0]["divergence"] is None
