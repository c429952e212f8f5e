"""The factor of `quantizer.gptq.factor` where one call of a library factors the whole: on GPUs.

With J the matrix that reverses an order, J H J = L Lᵀ is an ordinary Cholesky factorization, and
H = (J L J) (J L J)ᵀ, of which J L J is upper triangular: scaled to a unit diagonal, it is A.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from quantizer.gptq.factor import Blocks
from quantizer.jit import program


@program()
def factorize_whole(hessian_CC: Array, shift: Array) -> tuple[Blocks, Array]:
    """H + shift·I = A D Aᵀ as one panel; a failure shows as NaN pivots."""
    reversed_CC = (hessian_CC + shift * jnp.eye(hessian_CC.shape[0]))[::-1, ::-1]
    lower_CC = lax.linalg.cholesky(reversed_CC, symmetrize_input=False)
    scale_C = jnp.diagonal(lower_CC)[::-1]
    unit_CC = lower_CC[::-1, ::-1].T / scale_C[:, None]
    return ((unit_CC,),), scale_C**2
