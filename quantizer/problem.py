"""A layer as the solvers see it: weight_RC, [out_features, in_features], with groups of inputs.

Keras stores some kernels as another matrix of the same weights, [columns, rows], and runs groups
along its rows. Gemma's query (n, d, h) sums over d, but its stored rows are (n, d): a group is a
run of d inside one head, or spans two heads where its size does not divide d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.schemes import Scheme


@dataclass(frozen=True, slots=True)
class KernelAxes:
    """A kernel's shape, and which of its axes make up the weight matrix's columns and rows.

    Attributes:
        in_axes: kernel axes summed with the input, in kernel order.
        out_axes: the other kernel axes, in kernel order.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def in_features(self) -> int:
        """C: inputs summed into each output."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def out_features(self) -> int:
        """R: outputs, each with its own weights."""
        return math.prod(self.shape[axis] for axis in self.out_axes)

    def to_matrix(self, kernel: NDArray[Any]) -> NDArray[Any]:
        """Kernel → [out_features, in_features]."""
        return kernel.transpose(self.out_axes + self.in_axes).reshape(self.out_features, -1)

    def from_matrix(self, matrix_RC: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `to_matrix`."""
        axes = self.out_axes + self.in_axes
        return matrix_RC.reshape([self.shape[axis] for axis in axes]).transpose(np.argsort(axes))


@dataclass(frozen=True, slots=True)
class RowGroups:
    """How the weight matrix and the stored matrix hold the same kernel.

    Attributes:
        num_rows: rows of the stored matrix; it is the transpose of the kernel reshaped to them.
    """

    axes: KernelAxes
    num_rows: int

    def to_stored(self, matrix_RC: NDArray[Any]) -> NDArray[Any]:
        """[out_features, in_features] → [columns, rows]."""
        return self.axes.from_matrix(matrix_RC).reshape(self.num_rows, -1).T

    def to_matrix(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `to_stored`."""
        return self.axes.to_matrix(stored.T.reshape(self.axes.shape))

    def input_of_row(self) -> NDArray[np.intp]:
        """The input that each stored row multiplies, [rows]; each row must have only one."""
        shape = (self.axes.out_features, self.axes.in_features)
        inputs_RC = np.broadcast_to(np.arange(self.axes.in_features), shape)
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
        num_columns = math.prod(self.axes.shape) // self.num_rows
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


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """A validated layer to quantize; `quantizer.solver.check_layer` makes it.

    Attributes:
        weight_RC: [out_features, in_features], finite float32.
        scale_dtype: dtype in which scales will be stored ("float32", "bfloat16", "float16");
            they are rounded to it before codes are found.
        row_groups: where the stored format groups weights otherwise than the matrix; the
            result's weight is then the stored matrix.
        name: the layer, for messages.
    """

    weight_RC: NDArray[np.float32]
    scheme: Scheme
    scale_dtype: str
    row_groups: RowGroups | None
    name: str
