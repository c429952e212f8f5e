import numpy as np
import pytest

from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import Fidelity
from pipeline.run.evaluations import EVALUATIONS_PREFIX, Evaluation, find_evaluations
from pipeline.storage.object_store import open_store

RESULT, OTHER = "1" * 64, "2" * 64


def windows(token: int = 1) -> EvaluationSet:
    tokens = np.full((3, 8), token, np.int32)
    lengths = np.full(3, 8, np.int32)
    return EvaluationSet(
        windows=TokenWindows(tokens=tokens, lengths=lengths, fingerprint="f" * 64, num_documents=2)
    )


def fidelity(perplexity: float) -> Fidelity:
    return Fidelity(num_windows=3, count=21, source_perplexity=8.0, result_perplexity=perplexity)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_the_latest_evaluation_on_the_same_texts_counts(store):
    for perplexity in (9.0, 9.5):
        Evaluation.of(RESULT, windows(), fidelity(perplexity)).save(store)
    Evaluation.of(RESULT, windows(token=2), fidelity(10.0)).save(store)
    found = find_evaluations(store, RESULT, pytest.fail)
    assert sorted(one.figures["result_perplexity"] for one in found) == [9.5, 10.0]
    assert {one.measured_on["num_windows"] for one in found} == {3}
    assert {one.measured_on["sequence_length"] for one in found} == {8}


def test_named_sets_are_part_of_what_was_measured_on(store):
    named = EvaluationSet(windows=windows().windows, named={"novels": windows(token=2).windows})
    renamed = EvaluationSet(windows=windows().windows, named={"tales": windows(token=2).windows})
    found = [Evaluation.of(RESULT, one, fidelity(9.0)) for one in (windows(), named, renamed)]
    assert len({one.key for one in found}) == 3
    assert found[1].measured_on["sets"]["novels"]["num_windows"] == 3
    assert found[1].measured_on["tokens_sha256"] == found[0].measured_on["tokens_sha256"]


def test_an_evaluation_of_another_result_is_left_out(store):
    Evaluation.of(OTHER, windows(), fidelity(9.0)).save(store)
    assert find_evaluations(store, RESULT, pytest.fail) == ()


def test_what_is_not_finite_is_stored_as_null(store):
    Evaluation.of(RESULT, windows(), fidelity(float("inf"))).save(store)
    [found] = find_evaluations(store, RESULT, pytest.fail)
    assert found.figures["result_perplexity"] is None


def test_a_damaged_evaluation_is_named_and_costs_the_others_nothing(store):
    Evaluation.of(RESULT, windows(), fidelity(9.0)).save(store)
    store.put(f"{EVALUATIONS_PREFIX}some.json", b"{}")
    told = []
    [found] = find_evaluations(store, RESULT, told.append)
    assert found.figures["result_perplexity"] == 9.0
    [text] = told
    assert "evaluations/some.json" in text
    assert text.endswith("delete it, and evaluate again")
