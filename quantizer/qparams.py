"""Quantization parameters: the scale and zero point of each group of weights, and codes on them.

    value = (code - zero) * scale,    code in 0 … 2^bits - 1

as stock Keras reads gptq and awq layers. Arrays are transposed, [in_features, out_features],
which is how Keras keeps a kernel and how groups become contiguous runs of rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from quantizer.jit import product, program

# Range shrinkages tried by the search: 1.00, 0.96 … 0.20, then the best one's neighbours.
_COARSE_STEPS = 21
_COARSE_STEP = 0.04
_FINE_OFFSETS = (-0.02, -0.01, 0.01, 0.02)


def num_groups(in_features: int, group_size: int) -> int:
    """Groups along the inputs; the last one may be short."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def contiguous_groups(in_features: int, group_size: int) -> NDArray[np.int32]:
    """Group of each input when groups are runs of `group_size` inputs, [in_features]."""
    size = in_features if group_size == -1 else group_size
    return (np.arange(in_features) // size).astype(np.int32)


@program(
    static_argnames=(
        "weight_bits",
        "group_size",
        "symmetric",
        "search",
        "scale_dtype",
        "together",
    )
)
def find_grid(
    weight_CR: Array,
    energy_CR: Array,
    *,
    weight_bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    scale_dtype: str,
    together: bool = False,
) -> tuple[Array, Array]:
    """Scale and zero point of each group, from the weights before any is quantized.

    The range of a group always includes 0, so that 0 is exact and the zero point is a code.
    With `search`, the range is shrunk to minimise Σ energy·error²: at 2 and 3 bits a few clipped
    weights cost less than a coarse step for all of them.

    Args:
        weight_CR: [in_features, out_features], float32.
        energy_CR: weight of each squared error, [in_features, 1] or [in_features, out_features].
        scale_dtype: dtype in which the scale will be stored; it is rounded to it first, so
            that codes are found on the very grid that will be read back.
        together: all groups at once, as a GPU does best, instead of each while it is in cache.

    Returns:
        scale_GR and zero_GR, [groups, out_features], float32 (zero points are whole).
    """
    num_inputs, num_outputs = weight_CR.shape
    groups = num_groups(num_inputs, group_size)
    size = num_inputs if group_size == -1 else group_size
    # A short last group is padded with zeros: they lie in every range and weigh nothing.
    padding = ((0, groups * size - num_inputs), (0, 0))
    weight_GSR = jnp.pad(weight_CR, padding).reshape(groups, size, num_outputs)
    energy_GSR = jnp.pad(energy_CR, padding).reshape(groups, size, energy_CR.shape[1])
    of_group = partial(
        _group_grid,
        max_code=2.0**weight_bits - 1,
        symmetric=symmetric,
        search=search,
        scale_dtype=scale_dtype,
    )
    # One group at a time: all its shrunk ranges are tried while it is in cache.
    of_groups = jax.vmap(of_group) if together else partial(lax.map, of_group)
    grid: tuple[Array, Array] = of_groups((weight_GSR, energy_GSR))
    return grid


def _group_grid(
    group: tuple[Array, Array], *, max_code: float, symmetric: bool, search: bool, scale_dtype: str
) -> tuple[Array, Array]:
    """Scale and zero point of one group's weights and energies, [out_features] each."""
    weight_SR, energy_SR = group
    low_R = jnp.minimum(weight_SR.min(0), 0)
    high_R = jnp.maximum(weight_SR.max(0), 0)
    if symmetric:
        high_R = jnp.maximum(-low_R, high_R)
        low_R = -high_R

    def stored(scale_R: Array) -> Array:
        rounded_R = scale_R.astype(scale_dtype).astype(jnp.float32)
        # Where a scale rounds to 0, the least that can be stored keeps the largest weights.
        rounded_R = jnp.where(rounded_R > 0, rounded_R, _smallest_scale(scale_dtype))
        # Of a group that is all zero any scale will do.
        return jnp.where(scale_R > 0, rounded_R, 1.0)

    def zero_point(scale_R: Array) -> Array:
        if symmetric:
            return jnp.full_like(scale_R, (max_code + 1) / 2)
        return jnp.clip(jnp.round(-low_R / scale_R), 0, max_code)

    full_R = (high_R - low_R) / max_code
    # The zero point is a ratio within the range, which shrinking does not change.
    zero_R = zero_point(jnp.where(full_R > 0, full_R, 1.0))

    def error(scale_R: Array) -> Array:
        code_SR = encode(weight_SR, scale_R, zero_R, max_code)
        miss_SR = decode(code_SR, scale_R, zero_R) - weight_SR
        # A matrix product sums: XLA's CPU reductions over rows are several times slower.
        if energy_SR.shape[1] == 1:
            return product(energy_SR.T, miss_SR * miss_SR)[0]
        return product(jnp.ones((1, weight_SR.shape[0])), energy_SR * miss_SR * miss_SR)[0]

    def keep_better(best: tuple[Array, Array], shrink: Array) -> tuple[Array, Array]:
        shrink_R = jnp.broadcast_to(shrink, full_R.shape)
        loss_R = error(stored(full_R * shrink_R))
        better = loss_R < best[0]
        return jnp.where(better, loss_R, best[0]), jnp.where(better, shrink_R, best[1])

    shrink_R = jnp.ones_like(full_R)
    if search:
        best = (error(stored(full_R)), shrink_R)
        best = lax.fori_loop(
            1, _COARSE_STEPS, lambda i, b: keep_better(b, 1 - _COARSE_STEP * i), best
        )
        offsets = jnp.asarray(_FINE_OFFSETS)
        centre_R = best[1]
        best = lax.fori_loop(
            0, len(_FINE_OFFSETS), lambda i, b: keep_better(b, centre_R + offsets[i]), best
        )
        shrink_R = best[1]
    return stored(full_R * shrink_R), zero_R


def _smallest_scale(scale_dtype: str) -> float:
    """Float16 has subnormal numbers that float32 holds; XLA takes float32's own for zero."""
    limits = ml_dtypes.finfo(scale_dtype)
    return float(limits.smallest_subnormal if scale_dtype == "float16" else limits.tiny)


def encode(weight: Array, scale: Array, zero: Array, max_code: float) -> Array:
    """Nearest code of each weight (ties to even), as floats; shapes broadcast."""
    return jnp.clip(jnp.round(weight / scale) + zero, 0, max_code)


def decode(code: Array, scale: Array, zero: Array) -> Array:
    """The weights that codes stand for; shapes broadcast."""
    return (code - zero) * scale
