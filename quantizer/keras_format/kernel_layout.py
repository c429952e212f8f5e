"""A layer's kernel in three forms: as Keras builds it, as a matrix, and as Keras stores it.

The equation says which axes are in_features (summed with the input) and which are out_features
(shared with the output alone); solvers see weight_RC. Stock Keras stores gptq and awq kernels
as a matrix whose rows it picks by the kernel's largest axis, whatever the equation says. For most
kernels that is weight_RC, transposed; for Gemma's query (n, d, h), with d summed, Keras' rows
are (n, d), which repeat the d inputs for each head.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.errors import CalibrationError, LayerError
from quantizer.problem import KernelAxes, RowGroups
from quantizer.schemes import AWQScheme, GPTQScheme, Int4Scheme, Scheme


@dataclass(frozen=True, slots=True)
class KernelLayout(KernelAxes):
    """Where a kernel's in_features and out_features are; its shape is as Keras builds it.

    Attributes:
        input_axes: the input's axes that meet in_axes, counted from its end.
        scale_shape: a per-output-channel scale that broadcasts over the layer's output.
        scale_axes: the order of out_axes in it.
        batched: some kernel axis is in both input and output, so that each of its entries has
            a separate matrix and separate inputs (out_axes holds it).
    """

    input_axes: tuple[int, ...]
    scale_shape: tuple[int, ...]
    scale_axes: tuple[int, ...]
    batched: bool = False

    @property
    def keras_rows(self) -> int:
        """Rows of the layout in which stock Keras stores gptq and awq (groups run along them)."""
        return math.prod(self.shape[: self._num_row_axes])

    @property
    def keras_rows_are_inputs(self) -> bool:
        """Whether that layout is the weight matrix, transposed."""
        return self.in_axes == tuple(range(self._num_row_axes))

    @property
    def keras_rows_hold_one_input(self) -> bool:
        """Whether each row of that layout belongs to one input."""
        return set(self.in_axes) <= set(range(self._num_row_axes))

    @property
    def _num_row_axes(self) -> int:
        # Keras: shape.index(max(shape)) == 0 splits after the first axis, else after the second.
        if len(self.shape) == 2:
            return 1
        return 1 if self.shape.index(max(self.shape)) == 0 else 2

    def to_output(self, channel_R: NDArray[Any]) -> NDArray[Any]:
        """One value per output channel, [out_features] → broadcastable over the output."""
        values = channel_R.reshape([self.shape[axis] for axis in self.out_axes])
        order = [self.out_axes.index(axis) for axis in self.scale_axes]
        return values.transpose(order).reshape(self.scale_shape)

    def flatten_inputs(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """The layer's inputs → [..., in_features], in the order of the matrix's columns.

        Raises:
            CalibrationError: the inputs do not fit the kernel.
        """
        expected = tuple(self.shape[axis] for axis in self.in_axes)
        found = tuple(inputs.shape[axis] for axis in self.input_axes if -axis <= inputs.ndim)
        if found != expected:
            raise CalibrationError(
                f"inputs of shape {inputs.shape} do not fit a kernel of shape {self.shape}: "
                f"axes {self.input_axes} must be {expected}"
            )
        last = tuple(range(-len(self.input_axes), 0))
        moved = np.moveaxis(inputs, self.input_axes, last)
        return moved.reshape(*moved.shape[: -len(last)], -1)


def row_groups(layout: KernelLayout, scheme: Scheme, name: str) -> RowGroups | None:
    """How stock Keras groups the kernel in this scheme; None where it does as the weight matrix.

    Raises:
        LayerError: a kernel that stock Keras cannot store in this scheme; `name` is the layer.
    """
    match scheme:
        case GPTQScheme() | AWQScheme():
            if layout.batched or len(layout.shape) not in (2, 3):
                raise LayerError(
                    f"{name}: stock Keras stores {scheme.mode} kernels as one matrix, which a "
                    f"kernel of shape {layout.shape} with this equation is not; exclude the "
                    "layer, or use int8"
                )
            if layout.keras_rows_are_inputs:
                return None
            if isinstance(scheme, AWQScheme) and not layout.keras_rows_hold_one_input:
                raise LayerError(
                    f"{name}: stock Keras stores awq with one input scale a row, and the rows of "
                    f"a kernel {layout.shape} with this equation mix inputs; exclude the layer, "
                    "or use gptq"
                )
            num_rows = layout.keras_rows
        case Int4Scheme():
            # Keras reshapes the kernel to [in_features, out_features] without moving axes: where
            # its inputs are not the leading axes, the rows mix inputs.
            if layout.in_axes + layout.out_axes == tuple(range(len(layout.shape))):
                return None
            num_rows = layout.in_features
        case _:
            return None
    return RowGroups(KernelAxes(layout.shape, layout.in_axes, layout.out_axes), num_rows)


def dense_layout(shape: tuple[int, ...]) -> KernelLayout:
    """The layout of a Dense kernel, (in_features, out_features)."""
    return KernelLayout(shape, (0,), (1,), (-1,), (shape[1],), (1,))


def einsum_layout(equation: str, shape: tuple[int, ...]) -> KernelLayout:
    """The layout of an EinsumDense kernel, from its equation "input,kernel->output".

    Raises:
        LayerError: an equation with an ellipsis (stock Keras 3.15 fails to build such a layer
            quantized), or one that is not of this kernel.
    """
    if "..." in equation:
        raise LayerError(
            f"einsum equation {equation!r}: stock Keras cannot load a quantized EinsumDense "
            "whose equation has an ellipsis; exclude the layer, or write its axes out"
        )
    match = re.fullmatch("([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation)
    if match is None or len(match[2]) != len(shape):
        raise LayerError(f"cannot read the einsum equation {equation!r} of a kernel {shape}")
    source, kernel, target = match.groups()
    in_axes = tuple(i for i, label in enumerate(kernel) if label not in target)
    out_axes = tuple(i for i, label in enumerate(kernel) if label in target)
    return KernelLayout(
        shape,
        in_axes,
        out_axes,
        tuple(source.index(kernel[axis]) - len(source) for axis in in_axes),
        tuple(shape[kernel.index(label)] if label in kernel else 1 for label in target),
        tuple(kernel.index(label) for label in target if label in kernel),
        any(label in source and label in target for label in kernel),
    )
