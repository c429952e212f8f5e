"""What a traced block needs device memory for, beside its weights.

Attention's scores, of every position for every other, outgrow all else where windows are long. On
GPUs KerasHub's models leave them to cuDNN where it can do that: in 16 bits, for heads of up to 256
numbers, without soft caps. Its kernel keeps no scores. For the same shapes it gives the same bytes
on one kind of GPU: attention is not among what NVIDIA lists as not reproducible (cuDNN, "Odds and
Ends", Reproducibility), and of XLA's flag for deterministic operations only its gradient asks
anything (openxla/xla#14125). `make check-gpu` compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

Attention = Literal["scores", "cudnn"]

# JAX's name for what `jax.nn.dot_product_attention` has cuDNN do.
_CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"

# Compiled anew, among whatever else, these give the same bits; a product and a sum may be fused.
_MOVES = {"broadcast_in_dim", "concatenate", "copy", "expand_dims", "iota", "pad", "reshape"}
_MOVES |= {"convert_element_type", "select_n", "slice", "squeeze", "transpose"}
_COMPARES = {"and", "eq", "ge", "gt", "le", "lt", "max", "min", "ne", "not", "or"}
_SUMS = {"abs", "add", "neg", "sub"}
_EXACT = frozenset(_MOVES | _COMPARES | _SUMS)


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """What a block's call needs for one micro-batch.

    Attributes:
        attention: "cudnn" where cuDNN computes it and keeps no scores, in any of its layers.
        largest_array_bytes: of the largest array that it computes; scores where they are kept.
    """

    attention: Attention = "scores"
    largest_array_bytes: int = 0

    @classmethod
    def of(cls, traced: Jaxpr) -> BlockMemory:
        attention: Attention = "scores"
        largest = 0
        for equation in _equations(traced):
            if equation.primitive.name == _CUDNN_ATTENTION:
                attention = "cudnn"
            largest = max(largest, *(_num_bytes(v.aval) for v in equation.outvars), 0)
        return cls(attention=attention, largest_array_bytes=largest)

    def most(self, other: BlockMemory) -> BlockMemory:
        """What is enough for both blocks."""
        return BlockMemory(
            attention="cudnn" if "cudnn" in (self.attention, other.attention) else "scores",
            largest_array_bytes=max(self.largest_array_bytes, other.largest_array_bytes),
        )


@dataclass(frozen=True)
class Derived:
    """A value that is cheaper computed again than kept, such as an attention mask.

    Attributes:
        equations: indices of the program's equations that compute it.
        inputs: which of the program's inputs it follows from.
    """

    equations: frozenset[int]
    inputs: frozenset[Any]


def derived_values(program: Jaxpr, inputs: Sequence[Any]) -> dict[Any, Derived]:
    """Whole numbers and truth values that follow from such inputs alone, and are larger.

    A causal mask of [batch, positions, positions] would otherwise be kept for every window between
    two stages of a block: in KerasHub as int32, 16 MiB for 2,048 positions.

    Args:
        inputs: those that are kept anyway; not weights.
    """
    found = {v: Derived(frozenset(), frozenset([v])) for v in inputs if _is_whole(v.aval)}
    found |= {v: Derived(frozenset(), frozenset()) for v in program.constvars}
    for index, equation in enumerate(program.eqns):
        variables = [v for v in equation.invars if not isinstance(v, Constant)]
        if equation.effects or not _is_exact(equation) or not all(v in found for v in variables):
            continue
        made = Derived(
            frozenset([index]).union(*(found[v].equations for v in variables)),
            frozenset().union(*(found[v].inputs for v in variables)),
        )
        found |= dict.fromkeys(equation.outvars, made)
    return {
        variable: made
        for variable, made in found.items()
        if made.equations
        and _is_whole(variable.aval)
        and _num_bytes(variable.aval) > sum(_num_bytes(v.aval) for v in made.inputs)
    }


def _is_exact(equation: Any) -> bool:
    inner = list(_inner(equation))
    if inner:
        return all(_is_exact(x) for program in inner for x in program.eqns)
    return equation.primitive.name in _EXACT


def _equations(program: Jaxpr) -> Iterator[Any]:
    """A program's equations, and those of the programs that they call."""
    for equation in program.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation: Any) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for held in value if isinstance(value, tuple | list) else (value,):
            if isinstance(held, ClosedJaxpr):
                yield held.jaxpr
            elif isinstance(held, Jaxpr):
                yield held


def _is_whole(shape: Any) -> bool:
    dtype = getattr(shape, "dtype", None)
    return dtype is not None and np.dtype(dtype).kind in "biu"


def _num_bytes(shape: Any) -> int:
    if not hasattr(shape, "shape"):
        return 0
    return int(np.prod(shape.shape, dtype=np.int64)) * int(np.dtype(shape.dtype).itemsize)
