import dataclasses
import math

import numpy as np
import pytest

from pipeline.fidelity import Fidelity, WindowFidelity, average


def test_means_weigh_by_tokens_not_by_windows() -> None:
    windows = [
        WindowFidelity(count=3, source_loss=3.0, result_loss=6.0, divergence=0.3, agreement=3),
        WindowFidelity(count=1, source_loss=5.0, result_loss=2.0, divergence=0.5, agreement=0),
    ]
    found = average(windows)
    assert (found.num_windows, found.count) == (2, 4)
    assert found.source_perplexity == pytest.approx(math.exp(2.0))
    assert found.result_perplexity == pytest.approx(math.exp(2.0))
    assert found.divergence == pytest.approx(0.2)
    assert found.agreement == pytest.approx(0.75)
    assert found.cosine is None


def test_an_encoder_has_a_cosine_and_no_perplexity() -> None:
    found = average([WindowFidelity(count=4, cosine=3.0), WindowFidelity(count=1, cosine=1.0)])
    assert found.cosine == pytest.approx(0.8)
    assert found.source_perplexity is None
    assert found.divergence is None


def test_the_first_values_that_are_not_finite_are_named() -> None:
    fine = WindowFidelity(count=1, source_loss=1.0, result_loss=1.0)
    broken = WindowFidelity(
        count=1, source_loss=1.0, result_loss=math.nan, result_broken_at="block 3 (layer_3)"
    )
    found = average([fine, broken, broken])
    assert found.not_finite is not None
    assert "in 2 of 3 windows" in found.not_finite
    assert "in window 1 they first appear in block 3 (layer_3)" in found.not_finite
    both = dataclasses.replace(broken, source_broken_at="the output")
    assert str(average([both]).not_finite).endswith("and in the source in the output")
    assert average([fine]).not_finite is None


def test_a_loss_beyond_any_perplexity_is_infinite() -> None:
    found = average([WindowFidelity(count=1, source_loss=1.0, result_loss=1e4)])
    assert found.result_perplexity == math.inf


def test_the_99th_percentile_is_of_all_tokens_whatever_their_windows() -> None:
    tokens = np.random.default_rng(0).permutation(np.arange(1, 201, dtype=np.float32))
    for cut in ([200], [1, 199], [50] * 4):
        parts = np.split(tokens, np.cumsum(cut)[:-1])
        found = average(
            [
                WindowFidelity(count=len(p), source_loss=1.0, divergences=p, divergence=p.sum())
                for p in parts
            ]
        )
        assert found.divergence_p99 == 198.0
        assert found.divergence == pytest.approx(tokens.mean())


def test_figures_of_older_versions_are_read_and_written_as_they_were() -> None:
    figures = {
        "num_windows": 8, "count": 9, "source_perplexity": 20.0, "result_perplexity": None,
        "divergence": 0.1, "agreement": 0.9, "cosine": None,
    }  # fmt: skip
    assert Fidelity.from_figures(figures).figures() == figures


def test_a_million_windows_are_summed_exactly() -> None:
    losses = np.random.default_rng(0).uniform(1, 5, 100_000)
    found = average([WindowFidelity(count=1, source_loss=x, result_loss=x) for x in losses])
    assert found.source_perplexity == math.exp(math.fsum(losses) / len(losses))
