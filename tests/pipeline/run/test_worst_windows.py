from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import WindowFidelity, fidelity_of
from pipeline.run import worst_windows
from pipeline.run.evaluations import Evaluation
from pipeline.run.worst_windows import WorstWindows, find_worst_windows
from pipeline.storage.object_store import open_store

RESULT = "1" * 64


def token_windows(num: int, length: int = 8) -> TokenWindows:
    """Tokens count up from 100 times the window's number."""
    tokens = 100 * np.arange(num)[:, None] + np.arange(length)[None, :]
    return TokenWindows(
        tokens=tokens.astype(np.int32),
        lengths=np.full(num, length, np.int32),
        fingerprint="f" * 64,
        num_documents=1,
    )


def lost(*divergences: float, length: int = 8) -> WindowFidelity:
    """A window whose tokens lost this much, the rest nothing."""
    values = np.zeros(length - 1, np.float32)
    values[: len(divergences)] = divergences
    return WindowFidelity(
        count=length - 1,
        source_loss=7.0,
        result_loss=14.0,
        divergence=float(values.sum()),
        divergences=values,
    )


def decode(texts: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[f"<{token}>" for token in tokens] for tokens in texts]


def test_every_window_s_loss_is_kept_to_compare_results_by() -> None:
    given = EvaluationSet(windows=token_windows(3), named={"code": token_windows(1)})
    record = judged(given, [lost(0.7), lost(math.inf), lost(1.4), lost(2.1)])
    assert record.lost == {"": (0.1, None, 0.2), "code": (0.3,)}
    encoders = judged(
        EvaluationSet(windows=token_windows(2)),
        [WindowFidelity(count=8, cosine=value) for value in (8.0, 6.0)],
    )
    assert encoders.lost == {"": (0.0, 0.25)}


def judged(given: EvaluationSet, windows: Sequence[WindowFidelity]) -> WorstWindows:
    """Args: windows: of all sets, in their order."""
    rest = iter(windows)
    found = [[next(rest) for _ in batch.rows] for batch in given.batches]
    evaluation = Evaluation.of(RESULT, given, fidelity_of(given, found))
    return WorstWindows.of(evaluation, given, found, decode)


def test_the_worst_of_each_set_come_first_with_what_each_token_lost() -> None:
    given = EvaluationSet(windows=token_windows(4), named={"code": token_windows(1)})
    chosen = judged(given, [lost(0.7), lost(1.4, 0.7), lost(), lost(2.8), lost()]).windows
    assert [(one.text_set, one.number) for one in chosen] == [("", 3), ("", 1), ("code", 0)]
    first, second, _ = chosen
    assert (first.divergence, first.source_perplexity) == (0.4, 2.718)
    assert first.result_perplexity == pytest.approx(math.exp(2), rel=1e-3)
    assert second.text[:4] == (("<100>", None), ("<101>", 1.4), ("<102>", 0.7), ("<103>", 0.0))
    assert len(second.text) == 8


def test_what_is_not_finite_is_the_worst_and_kept_as_none() -> None:
    broken = dataclasses.replace(lost(math.nan), result_loss=math.nan, result_broken_at="x")
    given = EvaluationSet(windows=token_windows(3))
    first, second = judged(given, [lost(9.0), broken, lost(1.0)]).windows
    assert (first.number, first.divergence, first.result_perplexity) == (1, None, None)
    assert first.text[1] == ("<101>", None)
    assert second.number == 0


def test_of_a_long_window_the_stretch_that_lost_most_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worst_windows, "_MOST_TOKENS", 3)
    given = EvaluationSet(windows=token_windows(1))
    for divergences, start in (
        ((0, 0, 1, 1, 1), 3),  # of tokens 3, 4 and 5
        ((1, 0, 0, 0, 0, 0, 9), 5),
        ((9, 0, 0, 0, 0, 0, 1), 0),
    ):
        [found] = judged(given, [lost(*divergences)]).windows
        assert found.start == start
        assert [text for text, _ in found.text] == [f"<{start + i}>" for i in range(3)]
        total = max(sum(divergences[i : i + 3]) for i in range(5))
        assert sum(value or 0 for _, value in found.text) == min(total, sum(divergences))


def test_an_encoder_s_worst_are_those_least_alike() -> None:
    given = EvaluationSet(windows=token_windows(3))
    windows = [WindowFidelity(count=8, cosine=value) for value in (7.9, 4.0, 7.0)]
    chosen = judged(given, windows).windows
    assert [(one.number, one.cosine) for one in chosen] == [(1, 0.5), (2, 0.875)]
    assert all(value is None for one in chosen for _, value in one.text)


def test_many_sets_share_a_few_windows() -> None:
    named = {f"set-{i}": token_windows(2) for i in range(20)}
    given = EvaluationSet(named=named)
    chosen = judged(given, [lost(1.0)] * 40).windows
    assert len(chosen) == 8
    assert len({one.text_set for one in chosen}) == 8


def test_they_are_found_again_and_never_for_another_result(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    given = EvaluationSet(windows=token_windows(2))
    found = [[lost(1.0), lost(2.0)]]
    evaluation = Evaluation.of(RESULT, given, fidelity_of(given, found))
    assert find_worst_windows(store, evaluation) is None
    record = WorstWindows.of(evaluation, given, found, decode)
    record.save(store)
    assert find_worst_windows(store, evaluation) == record
    other = dataclasses.replace(evaluation, manifest_sha256="2" * 64)
    assert find_worst_windows(store, other) is None
    [key] = store.list()
    store.put(key, b"{}")
    assert find_worst_windows(store, evaluation) is None
