"""The rows that a router sends to each of some experts, in blocks of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp
from jax import Array

# Of one expert, multiplied at once.
_FEWEST_ROWS = 16
_MOST_ROWS = 512


@dataclass(frozen=True)
class RoutedRows:
    """Arrays in a traced program.

    Attributes:
        count_E: rows of each expert.
    """

    count_E: Array
    _row_P: Array
    _end_E: Array
    _blocks_E: Array
    _end_block_E: Array
    _block_rows: int

    @classmethod
    def of(
        cls,
        choice: Array,
        *,
        num_experts: int,
        all_experts: int,
        first: Array | int = 0,
        mask: Array | None = None,
    ) -> Self:
        """Sort the rows by expert.

        Args:
            choice: numbers of experts, [rows, experts per row].
            num_experts, first: which ones to take, of all.
            mask: rows that are to be left out, where it is false.
        """
        # Pairs of a row and an expert; those of other experts and padding come last.
        expert_P = choice - first if mask is None else jnp.where(mask[:, None], choice - first, -1)
        expert_P = jnp.where(expert_P < 0, num_experts, jnp.minimum(expert_P, num_experts))
        expert_P = expert_P.reshape(-1)
        count_E = jnp.bincount(expert_P, length=num_experts + 1)[:-1].astype(jnp.int32)
        block_rows = _rows_of_block(choice.size, all_experts)
        blocks_E = -(-count_E // block_rows)
        return cls(
            count_E=count_E,
            _row_P=jnp.argsort(expert_P, stable=True) // choice.shape[1],
            _end_E=jnp.cumsum(count_E),
            _blocks_E=blocks_E,
            _end_block_E=jnp.cumsum(blocks_E),
            _block_rows=block_rows,
        )

    @property
    def num_blocks(self) -> Array:
        return self._end_block_E[-1]

    def block(self, number: Array) -> tuple[Array, Array, Array]:
        """An expert, counted from the first one, rows, [B], and which of them are its own, [B]."""
        expert = jnp.searchsorted(self._end_block_E, number, side="right")
        in_expert = number - (self._end_block_E[expert] - self._blocks_E[expert])
        start = self._end_E[expert] - self.count_E[expert] + in_expert * self._block_rows
        pair_B = start + jnp.arange(self._block_rows)
        row_B = self._row_P[jnp.minimum(pair_B, len(self._row_P) - 1)]
        return expert, row_B, pair_B < self._end_E[expert]


def _rows_of_block(num_pairs: int, num_experts: int) -> int:
    """A power of two, about as many as an expert has of a micro-batch."""
    expected = max(1, num_pairs // num_experts)
    return min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (expected - 1).bit_length()))
