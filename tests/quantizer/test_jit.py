"""Programs compute in their own types, whatever JAX is told to prefer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import jax
import numpy as np
import pytest

from quantizer import (
    AWQScheme,
    DriftSum,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    Scheme,
    SolveResult,
    solve,
)
from tests.quantizer.problems import make

PREFERENCES = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}
SCHEMES = (
    GPTQScheme(group_size=16, activation_order=True, refinement_sweeps=1, drift_correction=0.5),
    AWQScheme(group_size=16, num_grid_points=3),
    Float8Scheme(),
    Int8Scheme(),
    Int4Scheme(block_size=16),
)


@pytest.fixture(params=PREFERENCES)
def preference(request: pytest.FixtureRequest) -> Iterator[str]:
    """A preference that is set for all threads, as environment variables set them."""
    for scheme in SCHEMES:
        by_default(scheme)
    name = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, PREFERENCES[name])
    yield name
    jax.config.update(name, before)


def solved(scheme: Scheme) -> SolveResult:
    problem = make(16, 48, 64)
    drift = None
    if isinstance(scheme, GPTQScheme):
        drift = DriftSum.of(problem.inputs_NC + np.float32(0.1), problem.inputs_NC)
    known = problem.magnitudes if isinstance(scheme, Float8Scheme) else problem.hessian
    return solve(problem.weight_RC, known, scheme, drift=drift)


@cache
def by_default(scheme: Scheme) -> SolveResult:
    return solved(scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=[scheme.mode for scheme in SCHEMES])
def test_preferred_types_change_no_bit(scheme: Scheme, preference: str) -> None:
    expected, found = by_default(scheme), solved(scheme)
    assert found.report == expected.report
    np.testing.assert_array_equal(found.weight.dequantize(), expected.weight.dequantize())


def test_the_preference_is_kept(preference: str) -> None:
    solved(SCHEMES[0])
    assert getattr(jax.config, preference) == PREFERENCES[preference]
