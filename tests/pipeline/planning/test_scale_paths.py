"""What can be divided so that one value of a program is, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.planning.flat_program import flat_program
from pipeline.planning.scale_paths import ScalePaths, reshaped_strides

X = jnp.ones((2, 3, 8))
W = jnp.ones((8,))
KERNEL = jnp.ones((8, 12))


def found(function: Callable[..., Any], *arguments: Any) -> list[dict[int, tuple[Any, ...]]]:
    """Ways to scale the last axis of what a function gives first, by argument; 0 is no weight."""
    program = flat_program(jax.make_jaxpr(function)(*arguments))
    paths = ScalePaths(program, program.arguments[1:])
    end, *kept = program.results
    rank = len(program.shapes[end])
    ways = paths.to(end, (*[0] * (rank - 1), 1))
    return [
        {argument: way.values[argument] for argument in sorted(way.arguments)}
        for way in ways
        if not paths.leaks(way, end, kept)
    ]


def test_a_factor_takes_scales_up() -> None:
    assert found(lambda x, w: x * w, X, W) == [{1: ((1,), 0.0)}]


def test_a_sum_takes_them_up_in_all_that_it_adds() -> None:
    ways = found(lambda x, w, b: x * w + b, X, W, W)
    assert ways == [{1: ((1,), 0.0), 2: ((1,), 0.0)}]
    assert found(lambda x, w: x * w + x, X, W) == []


def test_a_number_added_to_a_weight_is_known() -> None:
    assert found(lambda x, w: x * (1 + w), X, W) == [{1: ((1,), 1.0)}]
    assert found(lambda x, w: x * (w - 3), X, W) == [{1: ((1,), -3.0)}]
    assert found(lambda x, w: x * (1 - w), X, W) == []


def test_a_layer_takes_them_up_in_its_outputs() -> None:
    ways = found(lambda x, k, b: jax.nn.relu(x @ k + b), X, KERNEL, jnp.ones(12))
    assert ways == [{1: ((0, 1), 0.0), 2: ((1,), 0.0)}]


@pytest.mark.parametrize("activation", [jax.nn.gelu, jax.nn.silu, jnp.tanh, jnp.square, jnp.exp])
def test_what_scales_do_not_pass_ends_the_way(activation: Callable[[Any], Any]) -> None:
    assert found(lambda x, k: activation(x @ k), X, KERNEL) == []


def test_of_a_gated_product_only_the_factor_without_activation_can() -> None:
    ways = found(lambda x, gate, up: jax.nn.silu(x @ gate) * (x @ up), X, KERNEL, KERNEL)
    assert ways == [{2: ((0, 1), 0.0)}]


def test_whatever_is_used_elsewhere_cannot() -> None:
    assert found(lambda x, w: (x * w, jnp.sum(w)), X, W) == []
    assert found(lambda x, w: ((x * w) @ KERNEL, x * w), X, W) == []

    def twice(x: Any, w: Any) -> Any:
        norm = x * w
        return norm * 2, norm

    assert found(twice, X, W) == []


def test_values_of_attention_take_up_scales_that_heads_share() -> None:
    scores = jnp.ones((2, 4, 3, 3))

    def attend(x: Any, kernel: Any) -> Any:
        values = jnp.repeat(jnp.einsum("btc,chd->bthd", x, kernel), 2, axis=2)
        return jnp.einsum("bhts,bshd->bthd", scores, values).reshape(2, 3, 24)

    program = flat_program(jax.make_jaxpr(attend)(X, jnp.ones((8, 2, 6))))
    [way] = ScalePaths(program, program.arguments[1:]).to(program.results[0], (0, 0, 1))
    # Of head h and value d the scale is that of input 6 h + d, and neighbouring heads share it.
    assert way.values[1] == ((0, 12, 1), 0.0)
    assert way.shared == {(2, 6)}


@pytest.mark.parametrize(
    ("shape", "strides", "wanted", "expected"),
    [
        ((2, 24), (0, 1), (2, 4, 6), (0, 6, 1)),
        ((2, 4, 6), (0, 6, 1), (2, 24), (0, 1)),
        ((4, 6), (6, 1), (2, 12), (12, 1)),
        ((2, 1, 8), (0, 0, 1), (2, 8, 1), (0, 1, 0)),
        ((1, 8), (0, 1), (8,), (1,)),
        ((6,), (0,), (2, 3), (0, 0)),
        ((4, 6), (1, 4), (24,), None),
        ((3, 8), (0, 1), (24,), None),
    ],
)
def test_strides_follow_a_reshape(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    wanted: tuple[int, ...],
    expected: tuple[int, ...] | None,
) -> None:
    assert reshaped_strides(shape, strides, wanted) == expected
    if expected is not None:
        index = sum(np.indices(shape)[axis] * stride for axis, stride in enumerate(strides))
        other = sum(np.indices(wanted)[axis] * stride for axis, stride in enumerate(expected))
        np.testing.assert_array_equal(np.reshape(index, wanted), other)
