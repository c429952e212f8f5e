"""Weights that a stored format groups otherwise than along the rows of the weight matrix.

Solvers see a layer as weight_RC, [out_features, in_features], with groups as runs of inputs. Keras
stores some kernels as another matrix of the same weights, [columns, rows], and runs groups along
its rows. Gemma's query (n, d, h) sums over d, but its stored rows are (n, d): a group is a run of d
inside one head, or spans two heads where its size does not divide d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroups:
    """How the weight matrix and the stored matrix hold the same kernel.

    Attributes:
        shape: the kernel's shape.
        out_axes, in_axes: kernel axes that make up the weight matrix's rows and columns.
        num_rows: rows of the stored matrix; it is the transpose of the kernel reshaped to them.
    """

    shape: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    num_rows: int

    def to_stored(self, matrix_RC: NDArray[Any]) -> NDArray[Any]:
        """[out_features, in_features] → [columns, rows]."""
        axes = self.out_axes + self.in_axes
        kernel = matrix_RC.reshape([self.shape[axis] for axis in axes]).transpose(np.argsort(axes))
        return kernel.reshape(self.num_rows, -1).T

    def to_matrix(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `to_stored`."""
        out_features = math.prod(self.shape[axis] for axis in self.out_axes)
        kernel = stored.T.reshape(self.shape)
        return kernel.transpose(self.out_axes + self.in_axes).reshape(out_features, -1)

    def input_of_row(self) -> NDArray[np.intp]:
        """The input that each stored row multiplies, [rows]; each row must have only one."""
        in_features = math.prod(self.shape[axis] for axis in self.in_axes)
        out_features = math.prod(self.shape) // in_features
        inputs_RC = np.broadcast_to(np.arange(in_features), (out_features, in_features))
        row: NDArray[np.intp] = self.to_stored(inputs_RC)[0]
        return row

    def patterns(
        self, group_of_row: NDArray[np.int32]
    ) -> list[tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.intp]]]:
        """Output channels that group their inputs alike.

        Args:
            group_of_row: group of each stored row.

        Returns:
            For each way to group inputs: the output channels, [channels]; the group of each
            input, [in_features]; and where each of these groups is found among the stored ones,
            [channels, groups], as an index into a flat [columns, stored groups].
        """
        num_groups = int(group_of_row[-1]) + 1
        num_columns = math.prod(self.shape) // self.num_rows
        cell_RC = self.to_matrix(group_of_row + num_groups * np.arange(num_columns)[:, None])
        found: dict[bytes, tuple[NDArray[np.int32], list[int], list[NDArray[np.intp]]]] = {}
        for channel, cell_C in enumerate(cell_RC):
            cell_G, inverse_C = np.unique(cell_C, return_inverse=True)
            group_C = inverse_C.astype(np.int32)
            _, channels, cells = found.setdefault(group_C.tobytes(), (group_C, [], []))
            channels.append(channel)
            cells.append(cell_G)
        return [
            (np.asarray(channels), group_C, np.stack(cells))
            for group_C, channels, cells in found.values()
        ]
