"""A gate passes results that meet all its limits, and names the limits that others exceed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jobs.catalog.entries import Gate
from jobs.publish.verdict import failures, quality_figures, quality_text
from pipeline.fidelity import Fidelity

CAUSAL = Fidelity(
    num_windows=2, count=9, source_perplexity=20.0, result_perplexity=21.0, divergence=0.02,
    agreement=0.9,
)  # fmt: skip
ENCODER = Fidelity(num_windows=2, count=9, cosine=0.99)
NAN = Fidelity(
    num_windows=2, count=9, source_perplexity=20.0, result_perplexity=math.nan, divergence=math.nan
)
BROKEN = dataclasses.replace(NAN, not_finite="values that are not finite in 1 of 2 windows")


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
        (Gate(min_cosine=0.9), None, ["it was not evaluated"]),
    ],
)
def test_exceeded_limits_are_reported(
    gate: Gate | None, fidelity: Fidelity | None, said: list[str]
) -> None:
    found = failures(gate, fidelity)
    assert len(found) == len(said)
    assert all(wanted in text for wanted, text in zip(said, found, strict=True)), found


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
