"""Evaluation finds what stock Keras would, and says where a result cannot be used."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import jax
import keras_hub
import numpy as np
import pytest

from jobs.evaluating import measure
from jobs.publish.verdict import failures
from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation import batches
from pipeline.evaluation.batches import EvaluationSet
from pipeline.evaluation.choices import task_rows
from pipeline.evaluation.tasks import Question, Task
from pipeline.executor.protocol import WorkerLostError
from pipeline.fidelity import Fidelity, fidelity_of
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.planning.token_windows import question_tokens
from pipeline.worker.devices import Devices
from pipeline.worker.evaluate import evaluate
from pipeline.worker.streamed_model import StreamedModel, artifact_model, source_model
from pipeline.worker.worker import Worker
from tests.integration.quantized import SCHEMES, FinishedRun, finished_run, recipe
from tests.models.stock_load import load_stock
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.presets import overflowing_preset, shared_preset

QUESTIONS = (
    Question(text="Rain falls from", choices=("clouds", "the stones below"), answer=0),
    Question(text="Two and two are", choices=("three", "four", "a very large number"), answer=1),
    Question(text="Question: " + "so " * 9 + "Answer: ", choices=("yes", "no"), answer=1),
    Question(text="", choices=("The dog sleeps.", "Dog the sleeps."), answer=0),
)
TASK = Task(name="common-sense", questions=QUESTIONS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("run")
    return finished_run(shared_preset("Llama3"), recipe(SCHEMES["int8"]), folder)


@cache
def judged_on(source: Path) -> EvaluationSet:
    """Two batches of windows, and five or more of choices: two rows of 32 tokens, or one of 64."""
    preset = read_preset(str(source))
    rows = task_rows(TASK, question_tokens(preset, build_skeleton(preset)))
    tokens = np.random.default_rng(0).integers(5, 250, (4, 32)).astype(np.int32)
    lengths = np.array([32, 32, 32, 25], np.int32)
    windows = TokenWindows(tokens=tokens, lengths=lengths, fingerprint="0" * 64, num_documents=1)
    original, batches._TOKENS_PER_BATCH = batches._TOKENS_PER_BATCH, 64
    try:
        given = EvaluationSet(windows=windows, tasks=(rows,))
        assert {batch.length for batch in given.batches} == {32, 64}
    finally:
        batches._TOKENS_PER_BATCH = original
    return given


def workers(run: FinishedRun, count: int) -> LocalExecutor:
    return LocalExecutor([Worker(run.plan, str(run.source), str(run.folder)) for _ in range(count)])


def stock_likelihoods(preset: Path) -> list[float]:
    """Σ log p of each choice's tokens by stock Keras, all of its text before it."""
    tokenizer = keras_hub.models.Tokenizer.from_preset(str(preset))
    model = load_stock(keras_hub.models.CausalLM, preset)
    ids, bounds = np.zeros((9, 64), np.int32), []
    for question in QUESTIONS:
        context = question.text.rstrip()
        for choice in question.choices:
            whole = [tokenizer.start_token_id, *tokenizer(f"{question.text} {choice}")]
            ids[len(bounds), : len(whole)] = whole
            bounds.append((1 + (len(tokenizer(context)) if context else 0), len(whole)))
    mask = np.arange(64) < np.array([stop for _, stop in bounds])[:, None]
    logits = np.asarray(model({"token_ids": ids, "padding_mask": mask}), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [
        sum(log_p[row, i - 1, ids[row, i]] for i in range(start, stop))
        for row, (start, stop) in enumerate(bounds)
    ]


@pytest.mark.exhaustive
def test_choices_are_as_likely_as_stock_keras_finds_them(run: FinishedRun) -> None:
    given = judged_on(run.source)
    numbers = [i for i, batch in enumerate(given.batches) if batch.task == 0]
    worker = Worker(run.plan, str(run.source), str(run.folder))
    measured = worker.evaluate(given, numbers)
    by_row = {
        row: one
        for number, batch in zip(numbers, measured, strict=True)
        for row, one in zip(given.batches[number].rows, batch, strict=True)
    }
    found = [by_row[row] for row in range(9)]
    assert [one.source for one in found] == pytest.approx(stock_likelihoods(run.source), rel=1e-5)
    assert [one.result for one in found] == pytest.approx(stock_likelihoods(run.artifact), rel=1e-5)


def evaluate_on_workers(executor: LocalExecutor, given: EvaluationSet, *most: int) -> Fidelity:
    return fidelity_of(given, measure(executor, given, *most))


@pytest.mark.exhaustive
def test_any_number_of_workers_finds_the_same(run: FinishedRun) -> None:
    given = judged_on(run.source)
    figures = evaluate_on_workers(workers(run, 1), given).figures()
    assert figures["divergence_p99"] > figures["divergence"] > 0
    assert evaluate_on_workers(workers(run, 3), given).figures() == figures
    # Nor does it matter what passes the blocks together.
    assert evaluate_on_workers(workers(run, 2), given, 1).figures() == figures


@pytest.mark.exhaustive
def test_any_number_of_devices_finds_the_same(run: FinishedRun) -> None:
    given, devices = judged_on(run.source), Devices(jax.devices() * 3)
    assert len(given.batches) % 3 != 0
    worker = Worker(run.plan, str(run.source), str(run.folder), devices=devices)
    found = evaluate_on_workers(LocalExecutor([worker]), given)
    assert found.figures() == evaluate_on_workers(workers(run, 1), given).figures()


@pytest.mark.exhaustive
def test_sets_pass_the_blocks_together_and_have_the_figures_they_have_alone(
    run: FinishedRun, monkeypatch
) -> None:
    whole = judged_on(run.source).windows
    assert whole is not None
    halves = {"first": whole.chosen([0, 1]), "second": whole.chosen([2, 3])}
    advanced = []
    original = StreamedModel.advance
    monkeypatch.setattr(
        StreamedModel,
        "advance",
        lambda self, number, states: (advanced.append(number), original(self, number, states))[1],
    )
    found = evaluate_on_workers(workers(run, 1), EvaluationSet(windows=whole, named=halves))
    assert len(advanced) == 2 * run.plan.num_blocks, "source and result read each block once"
    assert [one.name for one in found.sets] == ["first", "second"]
    for one in found.sets:
        alone = evaluate_on_workers(workers(run, 1), EvaluationSet(windows=halves[one.name]))
        values = dataclasses.asdict(one)
        assert {values.pop("name")} <= halves.keys()
        assert {k: v for k, v in alone.figures().items() if k != "sets"} == values
    assert found.num_windows == 4


@pytest.mark.exhaustive
def test_a_lost_worker_s_share_is_evaluated_again(run: FinishedRun, monkeypatch) -> None:
    given = EvaluationSet(tasks=judged_on(run.source).tasks)
    executor = workers(run, 2)
    calls = []

    def lose_once(self, evaluated, numbers, tokens_per_pass, of):
        calls.append(list(numbers))
        if len(calls) == 2:
            raise WorkerLostError("killed")
        return original(self, evaluated, numbers, tokens_per_pass, of)

    original = Worker.evaluate
    monkeypatch.setattr(Worker, "evaluate", lose_once)
    found = evaluate_on_workers(executor, given)
    assert len(calls) == 4
    monkeypatch.undo()
    assert found.figures() == evaluate_on_workers(workers(run, 1), given).figures()
    assert found.num_windows == 0
    assert found.source_perplexity is None


@pytest.mark.parametrize("scheme", ["int4", "gptq8"])
@pytest.mark.exhaustive
def test_float16_overflows_in_the_evaluation_as_in_stock_keras(scheme: str, tmp_path: Path) -> None:
    run = finished_run(
        overflowing_preset(tmp_path / "in"), recipe(SCHEMES[scheme]), tmp_path / "out"
    )
    tokens = np.arange(5, 29, dtype="int32").reshape(2, 12)
    stock = keras_hub.models.CausalLM.from_preset(str(run.artifact))
    logits = stock({"token_ids": tokens, "padding_mask": np.ones((2, 12), bool)})
    assert not np.isfinite(logits).any()
    given = EvaluationSet(
        windows=TokenWindows(
            tokens=tokens, lengths=np.array([12, 3], np.int32), fingerprint="", num_documents=1
        )
    )
    artifact = artifact_model(run.model, run.store)
    found = evaluate(
        source_model(run.model), artifact, run.model.layout, given, [0], predicts_tokens=True
    )
    fidelity = fidelity_of(given, found)
    assert fidelity.not_finite is not None
    assert "2 of 2 windows" in fidelity.not_finite
    assert fidelity.not_finite.count("block 0 (transformer_layer_0)") == 2, "in the source, too"
    assert failures(None, fidelity) == (fidelity.not_finite,)
