"""Calibration statistics of a layer's input, summed, merged and finished on the device.

These programs are compiled apart from those that compute the input, so that summing changes no bit
of the activations: a block that runs again without it, to resume, gives the same ones.

On a CPU, where both read the same memory, sums are kept as NumPy's arrays: it adds them as fast,
and has nothing to compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.reduction import join
from pipeline.run.worker_api import InputSum
from pipeline.worker.captured_inputs import Captured
from pipeline.worker.memory import make_room
from pipeline.worker.routed_rows import RoutedRows
from quantizer import DriftSum, HessianSum, MagnitudeSum
from quantizer.experts import ExpertHessians, InputStatistics
from quantizer.gptq.drift import HeldBackSums, JudgedDrift

# A Gram is symmetric: cut into this many bands of rows, each is multiplied only from the diagonal
# on, which takes 10/16 of the flops, and of the bytes until it is finished.
_GRAM_BANDS = 4
_MIN_BAND_ROWS = 128

Sums = tuple[Array, ...]


def sum_inputs(
    inputs: Iterable[Captured], group: InputGroup, input_axes: tuple[int, ...]
) -> InputSum:
    """Sum the micro-batches of a group's input.

    Args:
        input_axes: the axes that are contracted with the kernel, counted from the end.
    """
    running = {False: _Running(group, input_axes)}
    for one in inputs:
        if one.held_back not in running:
            running[True] = _Running(group, input_axes)
        running[one.held_back].add(one)
    sums = {held_back: found.sum() for held_back, found in running.items()}
    return dataclasses.replace(sums[False], held_back=sums.get(True))


class _Running:
    """A sum over micro-batches, as far as they have come."""

    def __init__(self, group: InputGroup, input_axes: tuple[int, ...]) -> None:
        self._kind, self._size, self._axes = group.statistics, group.in_features, input_axes
        self._drift: Sums = ()
        self._num_rows = 0
        if self._kind == "hessian":
            make_room(4 * self._size**2)
            self._sums = tuple(jnp.zeros((b - a, self._size - a)) for a, b in _bands(self._size))
        else:
            self._sums = tuple(jnp.zeros(self._size) for _ in range(3))

    def add(self, one: Captured) -> None:
        # A program of its own for no padding saves a pass over the rows.
        mask = None if one.mask.all() else one.mask
        self._sums = _add(self._sums, one.inputs, mask, self._kind, self._axes)
        self._num_rows += int(np.count_nonzero(one.mask))
        if one.in_float is not None:
            if not self._drift:
                shape = (self._size, self._size)
                make_room(4 * self._size**2 * (1 + one.held_back))
                self._drift = tuple(jnp.zeros(shape) for _ in range(1 + one.held_back))
            self._drift = _add_drift(self._drift, one.inputs, one.in_float, mask, self._axes)

    def sum(self) -> InputSum:
        return InputSum(
            kind=self._kind,
            arrays=_kept(self._sums),
            num_rows=self._num_rows,
            drift=_kept(self._drift),
        )


def merged(left: InputSum, right: InputSum) -> InputSum:
    """The sum over both. On a device it takes the place of `left`, which is gone.

    The right one is copied there, if it is elsewhere.
    """
    merge: Any = partial(_merge, np)
    if isinstance(left.arrays[0], Array):
        merge, right = _merge_in_place, on_device(right, left.arrays[0].device)
    return _added(left, right, merge)


def _added(left: InputSum, right: InputSum, merge: Callable[..., Any]) -> InputSum:
    """Two sums, with whatever is summed beside either of them."""
    drift = left.drift or right.drift
    if left.drift and right.drift:
        drift = merge(left.drift, right.drift, left.kind)
    held_back = left.held_back or right.held_back
    if left.held_back is not None and right.held_back is not None:
        held_back = _added(left.held_back, right.held_back, merge)
    return dataclasses.replace(
        left,
        arrays=merge(left.arrays, right.arrays, left.kind),
        num_rows=left.num_rows + right.num_rows,
        drift=drift,
        held_back=held_back,
    )


def _moved(total: InputSum, move: Callable[[list[Any]], Iterable[Any]]) -> InputSum:
    """A sum whose arrays are elsewhere."""
    return dataclasses.replace(
        total,
        arrays=tuple(move(list(total.arrays))),
        drift=tuple(move(list(total.drift))),
        held_back=None if total.held_back is None else _moved(total.held_back, move),
    )


def on_device(total: InputSum, device: Any) -> InputSum:
    """A sum on a device; from another one it is copied there without passing the host."""
    first = total.arrays[0]
    # What is in NumPy goes to the first device by itself.
    here = first.device if isinstance(first, Array) else jax.devices()[0]
    if here == device:
        return total
    return _moved(total, lambda arrays: jax.device_put(arrays, device))


def made(total: InputSum) -> InputSum:
    """A sum, once nothing of it is still to be computed."""
    return _moved(total, jax.block_until_ready)


def in_numpy(total: InputSum) -> InputSum:
    """A sum that may be sent to another process."""
    return _moved(total, lambda arrays: map(np.asarray, arrays))


def judged_drift(total: InputSum) -> JudgedDrift | None:
    """The drift over a group's input, where it is corrected, with what judges the correction."""
    held_back = total.held_back
    if not total.drift or held_back is None:
        return None
    cross_CC, spread_CC = held_back.drift
    return JudgedDrift(
        _hessian(total),
        DriftSum(total.drift[0], total.num_rows),
        HeldBackSums(_hessian(held_back), DriftSum(cross_CC, held_back.num_rows), spread_CC),
    )


def of_experts(total: InputSum, experts: range | None) -> InputSum:
    """The sums of some of the experts of a sum; None for the whole of any sum."""
    if experts in (None, total.experts):
        return total
    assert experts is not None
    assert total.experts is not None
    first = total.experts.start
    chosen = slice(experts.start - first, experts.stop - first)
    arrays = tuple(array[chosen] for array in total.arrays)
    return dataclasses.replace(total, arrays=arrays, experts=experts)


def joined(found: Iterable[InputSum], experts: range | None, device: Any) -> InputSum:
    """The sum over the subtrees of a reduction, given in the order of their leaves; they stay.

    Args:
        experts: of which to add up sums; None for the whole of any sums.
        device: where to.
    """
    sums = [on_device(of_experts(one, experts), device) for one in found]
    numpy = jnp if any(isinstance(one.arrays[0], Array) for one in sums) else np
    return join(sums, partial(_added, merge=partial(_merge, numpy)))


def finished(total: InputSum) -> InputStatistics:
    """What solvers take; a Gram stays where it is, and magnitudes are too small to matter.

    It is over all windows, those that are held back too.
    """
    if total.held_back is not None:
        alone = dataclasses.replace(total, held_back=None)
        total = _added(alone, total.held_back, partial(_merge, jnp))
    if total.kind == "magnitudes":
        sum_abs_C, sum_square_C, max_abs_C = map(np.asarray, total.arrays)
        return MagnitudeSum(sum_abs_C, sum_square_C, max_abs_C, total.num_rows)
    if total.experts is not None:
        *bands, rows_E = total.arrays
        gram_ECC, rows_E = _kept((_whole(tuple(bands)), rows_E))
        return ExpertHessians(gram_ECC, np.asarray(rows_E, np.int64), total.experts.start)
    return _hessian(total)


def _hessian(total: InputSum) -> HessianSum:
    """Of the arrays themselves, without what is held back."""
    [gram_CC] = _kept((_whole(total.arrays),))
    return HessianSum(gram_CC, total.num_rows)


def _kept(arrays: Sums) -> tuple[Any, ...]:
    """Arrays as they are kept: on the device, which for a CPU is memory that NumPy has too.

    Where a CPU is cut into several devices, as in tests of workers with several GPUs, they stay on
    theirs.
    """
    is_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return tuple(map(np.asarray, arrays)) if is_cpu else arrays


def sum_routed(
    inputs: Iterable[tuple[Array, Array, NDArray[np.bool_]]], in_features: int, experts: range
) -> InputSum:
    """Sum the micro-batches of the inputs of some experts, given those of all.

    Each is summed over the rows that the router sends to it. They are gathered in blocks of one
    expert, so that a sum costs what these rows do, and not what all rows would for all experts.
    Whatever other experts are summed beside it, an expert's sum has the same bits.

    Args:
        inputs: each as Keras gives it, [experts, rows, in_features]; the router's choice of experts
            for each row, [rows, experts per row]; and a mask, [rows]: rows where that is false are
            left out.
    """
    make_room(4 * len(experts) * in_features**2)
    bands = [jnp.zeros((len(experts), b - a, in_features - a)) for a, b in _bands(in_features)]
    sums: Sums = (*bands, jnp.zeros(len(experts), jnp.int32))
    num_rows = 0
    for array, choice, mask in inputs:
        sums = _add_routed(sums, array, choice, mask, experts.start, all_experts=len(array))
        num_rows += int(np.count_nonzero(mask))
    return InputSum(kind="hessian", arrays=_kept(sums), num_rows=num_rows, experts=experts)


@partial(jax.jit, static_argnames=("statistics", "input_axes"), donate_argnums=(0,))
def _add(
    sums: Sums,
    inputs: Array,
    mask: Array | None,
    statistics: StatisticsKind,
    input_axes: tuple[int, ...],
) -> Sums:
    """Add a micro-batch: to the bands of a Gram, or to sums, squares and maxima by channel."""
    rows = _rows(inputs, input_axes)
    if statistics != "hessian" or rows.dtype != jnp.bfloat16:
        rows = rows.astype(jnp.float32)
    if mask is not None:
        # Not a product with the mask, since padding may hold infinity.
        rows = jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))
    rows_NC = rows.reshape(-1, rows.shape[-1])
    if statistics == "hessian":
        return tuple(
            band + _product(rows_NC[:, a:b].T, rows_NC[:, a:])
            for band, (a, b) in zip(sums, _bands(rows_NC.shape[1]), strict=True)
        )
    size_NC = jnp.abs(rows_NC)
    of_rows = jnp.sum(size_NC, axis=0), jnp.sum(jnp.square(size_NC), axis=0), jnp.max(size_NC, 0)
    return _merge(jnp, sums, of_rows, statistics)


@partial(jax.jit, static_argnames=("input_axes",), donate_argnums=(0,))
def _add_drift(
    sums: Sums, inputs: Array, in_float: Array, mask: Array | None, input_axes: tuple[int, ...]
) -> Sums:
    """Add a micro-batch to Σ (x - x̃)ᵀx̃, and to Σ (x - x̃)ᵀ(x - x̃) if that is summed too."""
    seen, exact = (_rows(array, input_axes).astype(jnp.float32) for array in (inputs, in_float))
    drift = exact - seen
    if mask is not None:
        seen, drift = (jnp.where(mask[..., None], rows, 0.0) for rows in (seen, drift))
    drift_NC, seen_NC = (rows.reshape(-1, rows.shape[-1]) for rows in (drift, seen))
    factors = (seen_NC, drift_NC)[: len(sums)]
    return tuple(
        total + _product(drift_NC.T, rows_NC) for total, rows_NC in zip(sums, factors, strict=True)
    )


def _rows(inputs: Array, input_axes: tuple[int, ...]) -> Array:
    """Inputs with all axes that the kernel contracts in one, the last."""
    last = tuple(range(-len(input_axes), 0))
    moved = jnp.moveaxis(inputs, input_axes, last)
    return moved.reshape(*moved.shape[: -len(last)], -1)


def _merge(
    numpy: Any, left: tuple[Any, ...], right: tuple[Any, ...], kind: StatisticsKind
) -> tuple[Any, ...]:
    """Add two sums' arrays, in NumPy or in JAX."""
    if kind == "hessian":
        return tuple(map(numpy.add, left, right))
    total, square, largest = zip(left, right, strict=True)
    return numpy.add(*total), numpy.add(*square), numpy.maximum(*largest)


_merge_in_place = jax.jit(partial(_merge, jnp), static_argnames="kind", donate_argnums=0)


@partial(jax.jit, static_argnames=("all_experts",), donate_argnums=(0,))
def _add_routed(
    sums: Sums, inputs: Array, choice: Array, mask: Array, first: Array, *, all_experts: int
) -> Sums:
    in_features = inputs.shape[-1]
    rows = RoutedRows.of(
        choice, num_experts=len(sums[-1]), all_experts=all_experts, first=first, mask=mask
    )

    def add_block(block: Array, bands: Sums) -> Sums:
        expert, row_B, kept_B = rows.block(block)
        rows_BC = inputs[first + expert, row_B]
        if rows_BC.dtype != jnp.bfloat16:
            rows_BC = rows_BC.astype(jnp.float32)
        # Not a product with the mask, since rows of other experts may hold infinity.
        rows_BC = jnp.where(kept_B[:, None], rows_BC, jnp.zeros((), rows_BC.dtype))
        return tuple(
            band.at[expert].add(_product(rows_BC[:, a:b].T, rows_BC[:, a:]))
            for band, (a, b) in zip(bands, _bands(in_features), strict=True)
        )

    bands = lax.fori_loop(0, rows.num_blocks, add_block, sums[:-1])
    return *bands, sums[-1] + rows.count_E


def _product(left: Array, right: Array) -> Array:
    """In float32, of which nothing is lost before the sum.

    Products of bfloat16 are exact in float32, in which tensor cores add them up; of float32 they
    are so only at the highest precision, without TF32.
    """
    return jnp.matmul(
        left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


@jax.jit
def _whole(bands: Sums) -> Array:
    """The Gram, [..., C, C], exactly symmetric, from its bands."""
    size = bands[0].shape[-1]
    before = [(0, 0)] * (bands[0].ndim - 1)
    padded = [jnp.pad(band, (*before, (size - band.shape[-1], 0))) for band in bands]
    upper = jnp.triu(jnp.concatenate(padded, axis=-2))
    return upper + jnp.matrix_transpose(jnp.triu(upper, 1))


def _bands(in_features: int) -> list[tuple[int, int]]:
    """Rows [a, b) of each band, which holds the columns from a on."""
    if in_features < _GRAM_BANDS * _MIN_BAND_ROWS:
        return [(0, in_features)]
    edges = [in_features * i // _GRAM_BANDS for i in range(_GRAM_BANDS + 1)]
    return list(pairwise(edges))
