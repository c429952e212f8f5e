"""Standard errors over windows and draws: by their formula, and by what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.quality.statistics import estimate, paired_difference


def test_with_one_draw_the_error_is_that_of_a_mean_over_windows() -> None:
    values_SW = np.random.default_rng(0).normal(size=(1, 40))
    found = estimate(values_SW)
    assert found.mean == pytest.approx(values_SW.mean())
    assert found.error == pytest.approx(values_SW.std(ddof=1) / np.sqrt(40))
    assert found.num_draws == 1


def test_draws_that_agree_leave_the_error_of_the_windows() -> None:
    """Repeating the same values gives no more windows."""
    values_W = np.random.default_rng(1).normal(size=40)
    found = estimate(np.stack([values_W] * 3))
    assert found.error == pytest.approx(values_W.std(ddof=1) / np.sqrt(40))


def test_the_error_covers_windows_and_draws_that_are_drawn_again() -> None:
    """Of many simulated measurements, the mean square error of the mean is the mean of error²."""
    rng = np.random.default_rng(2)
    num_draws, num_windows = 4, 30
    errors, squares = [], []
    for _ in range(4000):
        values_SW = (
            0.3 * rng.normal(size=(num_draws, 1))
            + 1.0 * rng.normal(size=(1, num_windows))
            + 0.8 * rng.normal(size=(num_draws, num_windows))
        )
        found = estimate(values_SW)
        errors.append(found.mean**2)
        squares.append(found.error**2)
    truth = 0.3**2 / num_draws + 1 / num_windows + 0.8**2 / (num_draws * num_windows)
    assert np.mean(errors) == pytest.approx(truth, rel=0.1)
    # A little above: where draws seem to agree by luck, the windows' own error is kept.
    assert truth * 0.98 < np.mean(squares) < truth * 1.15


def test_pairing_takes_out_what_both_rows_share() -> None:
    rng = np.random.default_rng(3)
    shared_SW = rng.normal(size=(1, 64)) + rng.normal(size=(3, 1))
    ours_SW = shared_SW + 0.01 * rng.normal(size=(3, 64))
    theirs_SW = shared_SW + 0.01 * rng.normal(size=(3, 64)) + 0.1
    found = paired_difference(ours_SW, theirs_SW)
    assert found.mean == pytest.approx(-0.1, abs=4 * found.error)
    assert found.error < 0.01 < 0.1 < estimate(ours_SW).error
    back = paired_difference(theirs_SW, ours_SW)
    assert back.mean == pytest.approx(-found.mean)
    assert back.error == pytest.approx(found.error)


def test_values_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="unpaired"):
        paired_difference(np.zeros((2, 8)), np.zeros((3, 8)))
    with pytest.raises(ValueError, match="windows >= 2"):
        estimate(np.zeros((2, 1)))
