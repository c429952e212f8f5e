"""What a composition was to be tells one from another."""

from __future__ import annotations

import math

import pytest

from pipeline.composition.decision import question
from pipeline.composition.target import Target
from pipeline.errors import PipelineError


def test_targets_that_differ_ask_for_different_compositions() -> None:
    """To the last digit: another limit may give another choice."""
    targets = [Target(bits=3.1234567), Target(bits=3.1234568), Target(num_bytes=3)]
    asked = [question(target, [], "", "") for target in targets]
    assert [one for one in asked if one == asked[0]] == asked[:1]


@pytest.mark.parametrize("bits", [0.0, -1.0, math.nan, math.inf, 1e308, 1000.5])
def test_bits_that_no_weight_takes_are_refused(bits: float) -> None:
    with pytest.raises(
        PipelineError, match=r"--target-bits .*: (a target is|no weight takes) more"
    ):
        Target(bits=bits)
