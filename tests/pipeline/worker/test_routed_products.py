"""Routed products are those of every row with every expert, but for rows that none is sent to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from pipeline.worker.expert_products import expert_products
from pipeline.worker.routed_products import with_routed_products
from quantizer.experts import expert_passes, expert_ranges, num_expert_ranges

EXPERTS, ROWS, INPUTS, OUTPUTS = 6, 40, 16, 8


def shared(bank: Any, rows: Any, scores: Any) -> Any:
    choice = jax.lax.top_k(scores, 2)[1]
    return choice, jnp.einsum("th,ehm->etm", rows, bank.astype(rows.dtype))


def own(bank: Any, rows: Any, scores: Any) -> Any:
    choice = jax.lax.top_k(scores, 2)[1]
    spread = jnp.broadcast_to(rows, (EXPERTS, *rows.shape)) * jnp.arange(1.0, 7)[:, None, None]
    return choice, jnp.einsum("eti,eih->eth", spread, bank)


def own_bank_first(bank: Any, rows: Any, scores: Any) -> Any:
    choice = jax.lax.top_k(scores, 2)[1]
    spread = jnp.broadcast_to(rows, (EXPERTS, *rows.shape)) * jnp.arange(1.0, 7)[:, None, None]
    return choice, jnp.einsum("eih,eti->eht", bank, spread).transpose(0, 2, 1)


def shared_rows_first(bank: Any, rows: Any, scores: Any) -> Any:
    choice = jax.lax.top_k(scores, 2)[1]
    made = jax.lax.dot_general(rows, bank, (((1,), (1,)), ((), ())))
    return choice, made.transpose(1, 0, 2)


def given(dtype: Any = np.float32) -> list[Any]:
    random = np.random.default_rng(0)
    scores = random.random((ROWS, EXPERTS))
    scores[:, 4] = -1  # an expert that no row is sent to
    bank = random.normal(size=(EXPERTS, INPUTS, OUTPUTS)).astype(dtype)
    return [bank, random.normal(size=(ROWS, INPUTS)).astype(np.float32), scores]


@pytest.mark.parametrize("run", [shared, own, own_bank_first, shared_rows_first])
def test_rows_are_multiplied_by_the_experts_that_they_are_sent_to(run: Any) -> None:
    values = given(jnp.bfloat16 if run is shared else np.float32)
    traced = jax.make_jaxpr(run)(*values)
    products = expert_products(traced.jaxpr, traced.jaxpr.invars[:1])
    assert len(products) == 1
    routed = with_routed_products(traced, products.values())
    choice, found = jaxpr_as_fun(routed)(*map(jnp.asarray, values))
    _, expected = run(*map(jnp.asarray, values))
    sent = np.zeros((EXPERTS, ROWS), bool)
    sent[np.asarray(choice).T, np.arange(ROWS)] = True
    assert sent.sum() == 2 * ROWS
    np.testing.assert_allclose(
        np.asarray(found)[sent], np.asarray(expected)[sent], rtol=1e-5, atol=1e-5
    )
    assert not np.asarray(found)[~sent].any()


def used_twice(bank: Any, rows: Any, scores: Any) -> Any:
    return shared(bank, rows, scores), bank.sum()


def two_routers(bank: Any, rows: Any, scores: Any) -> Any:
    return own(bank, rows, scores), jax.lax.top_k(-scores, 2)[1]


def other_axis(bank: Any, rows: Any, scores: Any) -> Any:
    return jnp.einsum("th,emh->etm", rows, bank.transpose(0, 2, 1)), scores


@pytest.mark.parametrize("run", [used_twice, two_routers, other_axis])
def test_what_is_used_otherwise_is_no_bank_of_experts(run: Any) -> None:
    traced = jax.make_jaxpr(run)(*given())
    assert expert_products(traced.jaxpr, traced.jaxpr.invars[:1]) == {}


@pytest.mark.parametrize(("num_experts", "in_features"), [(8, 14336), (128, 768), (256, 2048)])
def test_no_more_than_a_gibibyte_of_hessians_is_summed_at_once(
    num_experts: int, in_features: int
) -> None:
    """As in Mixtral 8x7B, Qwen3-30B-A3B and DeepSeek-V3."""
    ranges = expert_ranges(num_experts, num_expert_ranges(num_experts, in_features))
    assert [expert for one in ranges for expert in one] == list(range(num_experts))
    passes = expert_passes(ranges, in_features)
    assert [number for one in passes for number in one] == list(range(len(ranges)))
    for together in passes:
        held = sum(len(ranges[number]) for number in together)
        assert held * 4 * in_features**2 <= 1 << 30
