"""What a plan says of its source's weights: their digests, found by many threads and processes.

A part of the model is named by the SHA-256 of a JSON object that has, by each variable's path, its
dtype, shape, and the SHA-256 of its values in C order. Values are those that the model is given:
cast to its dtypes, and finite. So the name depends neither on how files are cut or compressed, nor
on who reads which variable when. All of it has to be read before a plan is written, since the
plan's own digest, and with it every record of the run, follows from it. A dry run reads no values,
and its plan has no digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.canonical import sha256

_PIECE_BYTES = 128 << 20
"""Read and hashed at once by a thread, unless one variable is larger."""
_MOST_THREADS = 8
"""More would hold more pieces in memory than a disk or a network can keep filled."""

_TILE = 128
"""Rows and columns that are copied at once."""

VariableDigest: TypeAlias = tuple[str, tuple[int, ...], str]
"""dtype, shape, and the SHA-256 of the values."""
SizedPath: TypeAlias = tuple[str, int]
"""A variable's path, and its bytes as stored."""


class ReadsValues(Protocol):
    """A source, of which only this is needed here."""

    def read(self, paths: Iterable[str]) -> dict[str, NDArray[Any]]: ...


def variable_digest(value: NDArray[Any]) -> VariableDigest:
    """What identifies one variable's value."""
    digest = hashlib.sha256()
    for piece in _in_c_order(value):
        digest.update(piece.view(np.uint8).data)
    return str(value.dtype), value.shape, digest.hexdigest()


def _in_c_order(value: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An array's values in C order, as contiguous pieces.

    Kernels of Hugging Face models come transposed. Copied whole they take twenty times as long as
    their hash does, since each value lies in another page: here a tile's lines stay in the cache.
    """
    if value.flags.c_contiguous:
        yield value.reshape(-1)
        return
    try:
        rows = np.reshape(value, (len(value), -1), copy=False)
    except ValueError:  # the other axes are not one
        for inner in value:
            yield from _in_c_order(inner)
        return
    for a in range(0, rows.shape[0], _TILE):
        slab = np.empty((min(_TILE, rows.shape[0] - a), rows.shape[1]), value.dtype)
        for b in range(0, rows.shape[1], _TILE):
            tile = (slice(a, a + _TILE), slice(b, b + _TILE))
            slab[:, tile[1]] = rows[tile]
        yield slab.reshape(-1)


def part_digest(variables: Mapping[str, VariableDigest]) -> str:
    """What identifies a part of a model, by the paths of its variables."""
    return sha256(json.dumps(variables, sort_keys=True).encode())


def values_digest(values: Mapping[str, NDArray[Any]]) -> str:
    """What identifies a part of a model whose values are at hand."""
    return part_digest({path: variable_digest(value) for path, value in values.items()})


def part_digests(
    parts: Sequence[Sequence[SizedPath]], found: Mapping[str, VariableDigest]
) -> list[str]:
    """What identifies each part of a model, once all its variables are read."""
    return [part_digest({path: found[path] for path, _ in held}) for held in parts]


@dataclass(frozen=True)
class Reading:
    """Values being read and hashed by threads (see `read_in_threads`)."""

    pool: ThreadPoolExecutor
    pieces: Sequence[Future[dict[str, VariableDigest]]]

    def result(self) -> dict[str, VariableDigest]:
        """Wait for all of it.

        Raises:
            SourceError: values that cannot be read, or are not finite.
        """
        found: dict[str, VariableDigest] = {}
        try:
            for piece in self.pieces:
                found |= piece.result()
        finally:
            self.cancel()
        return found

    def cancel(self) -> None:
        """Read no more than what was begun."""
        self.pool.shutdown(cancel_futures=True)


def read_in_threads(source: ReadsValues, variables: Sequence[SizedPath], threads: int) -> Reading:
    """Begin to read and hash variables, piece by piece."""
    pool = ThreadPoolExecutor(min(max(1, threads), _MOST_THREADS), thread_name_prefix="digests")

    def digests(paths: tuple[str, ...]) -> dict[str, VariableDigest]:
        values = source.read(paths)
        # Each is freed as soon as it is hashed.
        return {path: variable_digest(values.pop(path)) for path in paths}

    return Reading(pool, [pool.submit(digests, paths) for paths in _pieces(variables)])


def read_side_by_side(
    source: ReadsValues, variables: Sequence[SizedPath], threads: int
) -> tuple[dict[str, NDArray[Any]], str]:
    """Read and hash the variables of a part by so many threads; the values, and the part's digest.

    Raises:
        SourceError: values that cannot be read, or are not finite.
    """

    def read(share: Sequence[SizedPath]) -> list[tuple[str, NDArray[Any], VariableDigest]]:
        values = source.read([path for path, _ in share])
        return [(path, value, variable_digest(value)) for path, value in values.items()]

    with ThreadPoolExecutor(threads, thread_name_prefix="reading") as pool:
        found = [one for share in pool.map(read, shares(variables, threads)) for one in share]
    values = {path: value for path, value, _ in found}
    return values, part_digest({path: digest for path, _, digest in found})


def _pieces(variables: Sequence[SizedPath]) -> list[tuple[str, ...]]:
    """Paths in their order, cut where a piece would become too large."""
    pieces: list[list[str]] = []
    held = _PIECE_BYTES
    for path, num_bytes in variables:
        if held + num_bytes > _PIECE_BYTES:
            pieces.append([])
            held = 0
        pieces[-1].append(path)
        held += num_bytes
    return list(map(tuple, pieces))


def shares(variables: Sequence[SizedPath], number: int) -> list[list[SizedPath]]:
    """Cut variables, in their order, into at most `number` shares of about the same bytes.

    In their order, since neighbours are in one file.
    """
    total = sum(num_bytes for _, num_bytes in variables)
    cut: list[list[SizedPath]] = [[] for _ in range(number)]
    before = 0
    for path, num_bytes in variables:
        middle = before + num_bytes / 2
        cut[min(number - 1, int(middle * number / max(total, 1)))].append((path, num_bytes))
        before += num_bytes
    return [share for share in cut if share]
