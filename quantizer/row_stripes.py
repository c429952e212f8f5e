"""Passes over large matrices, by stripes that stay in cache, on several threads.

They give what one operation of NumPy after another gives for the whole matrix, bit for bit, without
temporaries of its size: a table of tokens has hundreds of millions of weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

_STRIPE = 1 << 18
"""Numbers of a stripe: it and a few temporaries of its size stay in a core's own cache."""
_MOST_THREADS = 8
"""More would only wait for memory."""


def by_rows(work: Callable[[slice], object], shape: tuple[int, ...]) -> None:
    """Call `work` for each stripe of rows of a matrix of this shape, several at once."""
    num_rows, size = shape
    height = max(1, _STRIPE // size)
    stripes = [slice(a, min(a + height, num_rows)) for a in range(0, num_rows, height)]
    _each(work, stripes)


def sum_of_squares(value: NDArray[np.float32], other: NDArray[np.float32] | None = None) -> float:
    """Σ value² or Σ (value - other)² in float64, with the bits of `np.sum` of all squares at once.

    NumPy sums the two halves of an array, down to a few numbers (`pairwise_sum` in its
    loops_utils.h.src); here the same halves are summed by threads.
    """
    arrays = [value] if other is None else [value, other]
    if not all(array.flags.c_contiguous for array in arrays):
        return _squares(arrays)  # NumPy then chooses the order of the numbers
    flat = [array.reshape(-1) for array in arrays]
    ranges = list(_summed_apart(0, flat[0].size))
    sums = _each(lambda bounds: _squares([array[slice(*bounds)] for array in flat]), ranges)
    return _added(0, flat[0].size, iter(sums))


def _squares(arrays: list[NDArray[np.float32]]) -> float:
    difference = arrays[0] if len(arrays) == 1 else arrays[0] - arrays[1]
    return float(np.sum(np.square(difference, dtype=np.float64)))


def _summed_apart(start: int, stop: int) -> Iterator[tuple[int, int]]:
    if stop - start <= _STRIPE:
        yield start, stop
        return
    middle = _middle(start, stop)
    yield from _summed_apart(start, middle)
    yield from _summed_apart(middle, stop)


def _added(start: int, stop: int, sums: Iterator[float]) -> float:
    """The sum over a range, of the sums of what `_summed_apart` cuts it into."""
    if stop - start <= _STRIPE:
        return next(sums)
    middle = _middle(start, stop)
    left = _added(start, middle, sums)
    return left + _added(middle, stop, sums)


def _middle(start: int, stop: int) -> int:
    """Where NumPy halves a range: before a multiple of eight numbers."""
    half = (stop - start) // 2
    return start + half - half % 8


def _each(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    if len(pieces) == 1:
        return [work(pieces[0])]
    threads = min(len(pieces), _MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, pieces))
