"""Multiply rows by the experts that they are sent to, and not by all.

KerasHub computes every row by every expert, and weighs the results of all others by zero. Here
those results are zeros from the start: the rows of an expert are gathered in blocks, and what they
give is put where KerasHub has it. On a CPU, where products take nearly all of the time, those of
128 experts of which a row is sent to 8 are ten times as fast. A GPU has to be given larger products
than such blocks, and computes them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from pipeline.worker.expert_products import ExpertProduct
from pipeline.worker.routed_rows import RoutedRows


def with_routed_products(traced: ClosedJaxpr, products: Iterable[ExpertProduct]) -> ClosedJaxpr:
    """The program with these products as routed ones, where the router's choice is known."""
    made_by = {v: i for i, equation in enumerate(traced.jaxpr.eqns) for v in equation.outvars}
    by_equation = {
        product.equation: product
        for product in products
        if product.router is not None and made_by[product.router] < product.equation
    }
    equations = [
        _routed(equation, by_equation[number]) if number in by_equation else equation
        for number, equation in enumerate(traced.jaxpr.eqns)
    ]
    return ClosedJaxpr(traced.jaxpr.replace(eqns=equations), traced.consts)


def _routed(equation: Any, product: ExpertProduct) -> Any:
    """The equation of a product, as one that also takes the choice."""
    given, bank = product.operands(equation)
    [result] = equation.outvars
    run = partial(
        _multiply,
        order=product.result_axes(equation),
        precision=equation.params["precision"],
        dtype=result.aval.dtype,
    )
    taken = [given, bank, product.router]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taken]
    inner: Jaxpr = jax.make_jaxpr(jax.jit(run))(*shapes).jaxpr
    [call] = inner.eqns
    return call.replace(invars=taken, outvars=[result])


def _multiply(
    given: Array, bank: Array, choice: Array, *, order: Sequence[int], precision: Any, dtype: Any
) -> Array:
    """Products with rows; zeros for experts that a row is not sent to.

    Args:
        given: [rows, C], or [experts, rows, C].
        bank: [experts, C, M].
        choice: numbers of experts, [rows, experts per row].
        order: of the axes [experts, rows, M] in the result.
    """
    num_experts, num_rows = len(bank), len(choice)
    rows = RoutedRows.of(choice, num_experts=num_experts, all_experts=num_experts)

    def add_block(block: Array, made: Array) -> Array:
        expert, row_B, kept_B = rows.block(block)
        taken_BC = given[row_B] if given.ndim == 2 else given[expert, row_B]
        product_BM = lax.dot(
            taken_BC, bank[expert], precision=precision, preferred_element_type=dtype
        )
        # Rows beyond the expert's are put nowhere.
        place_B = jnp.where(kept_B, row_B, num_rows)
        return made.at[expert, place_B].set(product_BM, mode="drop")

    start = jnp.zeros((num_experts, num_rows, bank.shape[2]), dtype)
    made: Array = lax.fori_loop(0, rows.num_blocks, add_block, start)
    return made.transpose(order)
