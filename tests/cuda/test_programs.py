"""What `make check-cuda` tells of compiled programs; here compiled for a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pipeline.worker.block_memory import BlockMemory
from tests.cuda.programs import (
    PANEL_PROGRAMS,
    Compiled,
    CompiledBlock,
    compile_block,
    solver_problems,
)

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


def test_kernels_are_counted_whatever_they_return() -> None:
    def both(query: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.linalg.eigh(query[0, :, 0, :, None] * query[0, :, 0, None, :])

    assert compiled(both).kernels > compiled(lambda query: query + 1).kernels


def test_a_solver_of_too_many_kernels_or_programs_is_a_problem() -> None:
    def programs(*, kernels: int = 12, loops: int = 0, potrf: int = 2) -> list[Compiled]:
        calls = Counter({"cusolver_potrf_ffi": potrf})
        names = [name for step in PANEL_PROGRAMS for name in step]
        return [
            Compiled("solver: factorize_whole", 0, calls, 0, 4, 0.0, 0),
            *(Compiled(f"solver: {x}", 0, Counter(), 0, kernels // 3, 0.0, loops) for x in names),
        ]

    assert solver_problems(programs(), widths=2) == []
    assert solver_problems(programs(kernels=32 * 3), widths=2) == [
        "_solve_panel: 96 kernels for the 32 tiles of a panel",
        "_refine_panel: 96 kernels for the 32 tiles of a panel",
    ]
    assert len(solver_problems(programs(loops=1), widths=2)) == 6
    assert solver_problems(programs(potrf=1), widths=2) == ["1 calls of cuSOLVER factor 2 widths"]
    assert solver_problems(programs() * 9, widths=18) == ["the solver has 63 programs, over 60"]


@pytest.mark.exhaustive
def test_the_stages_of_a_block_are_compiled_one_after_another() -> None:
    block = compile_block(SingleDeviceSharding(jax.devices("cpu")[0]), LENGTH, "float32")
    names = [stage.name.rpartition("up to ")[2] for stage in block.stages]
    assert names[0] == "query and key and value"
    assert names[-1] == "the block's output"
    assert len(names) == 5
    assert block.memory.attention == "scores"
    assert block.memory.largest_array_bytes == max(32 * LENGTH**2, 14336 * LENGTH) * 4
