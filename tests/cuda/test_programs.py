"""What `make check-cuda` tells of compiled programs; here compiled for a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pipeline.worker.block_memory import BlockMemory
from tests.cuda.programs import Compiled, CompiledBlock

LENGTH = 96


def compiled(attend: Any) -> Compiled:
    query = jax.ShapeDtypeStruct((1, LENGTH, 4, 8), jnp.float32)
    return Compiled.of("attention", jax.jit(attend).lower(query), LENGTH)


def whole(query: jax.Array) -> jax.Array:
    scores = jnp.einsum("btnh,bsnh->bnts", query, query)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), query)


def by_position(query: jax.Array) -> jax.Array:
    def one(row: jax.Array) -> jax.Array:
        scores = jnp.einsum("nh,snh->ns", row, query[0])
        return jnp.einsum("ns,snh->nh", jax.nn.softmax(scores), query[0])

    return jax.lax.map(one, query[0])[None]


def test_scores_in_memory_are_found() -> None:
    assert compiled(whole).scores_bytes == 4 * LENGTH * LENGTH * 4
    assert compiled(by_position).scores_bytes == 0


def test_a_block_in_bfloat16_may_keep_none() -> None:
    def problems(dtype: str, stage: Compiled, attention: Any, foreseen_bytes: int) -> int:
        memory = BlockMemory(attention=attention)
        return len(CompiledBlock(dtype, LENGTH, [stage], memory, foreseen_bytes).problems())

    kept, none = compiled(whole), compiled(by_position)
    assert problems("bfloat16", none, "cudnn", 1 << 30) == 0
    assert problems("bfloat16", none, "scores", 1 << 30) == 1
    assert problems("bfloat16", kept, "cudnn", 1 << 30) == 1
    assert problems("float32", kept, "scores", 1 << 30) == 0
    assert problems("float32", kept, "scores", -(1 << 30)) == 1
