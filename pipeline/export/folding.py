"""Input scales of a foldable awq, taken up by what gives the input (see `pipeline.fold`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.codes import KernelCodes
from pipeline.fold import Fold, FoldedVariable
from pipeline.model.tensor_places import TensorPlaces
from pipeline.plan import Plan
from quantizer.keras_format.kernel_layout import KernelLayout, row_groups
from quantizer.schemes import Scheme

_SCALES = "awq_scales"


@dataclass(frozen=True)
class Divisor:
    """The input scales that a variable takes up."""

    variable: FoldedVariable
    scale_C: NDArray[np.float32]

    def divided(self, value: NDArray[Any]) -> NDArray[Any]:
        """A variable in float."""
        return self.variable.divided(value, self.scale_C)

    def divided_codes(self, kernel: KernelCodes) -> KernelCodes:
        """A kernel in codes, which stay: the scales of its groups are divided.

        Raises:
            ExportError: codes of one group would have to be divided by different scales.
        """
        scale = self.variable.scale_of(kernel.codes.shape, self.scale_C)
        by_code = np.broadcast_to(scale, kernel.codes.shape)
        by_group = np.ones(kernel.scale.size)
        by_group[kernel.group.reshape(-1)] = by_code.reshape(-1)
        if not np.array_equal(by_group[kernel.group], by_code):
            raise ExportError(
                f"{self.variable.path}: a group of its weights spans outputs that are to be "
                "divided by different input scales of the next layer; quantize it with a "
                "group_size that divides the inputs of one head, or use --format dense"
            )
        return replace(kernel, scale=(kernel.scale / by_group).astype(np.float32))


def folds_of(plan: Plan, places: TensorPlaces) -> dict[str, Fold]:
    """What takes up a layer's input scales, by the layer's path.

    Raises:
        ExportError: a variable that would take them up has no place in a checkpoint.
    """
    found: dict[str, Fold] = {}
    for part in plan.parts:
        paths = {layer.name: layer.path for layer in part.layers}
        for group in part.groups:
            if group.fold is None:
                continue
            for variable in group.fold.variables:
                constant = places.conversions[variable.path].constant
                if constant is not None and (variable.offset or np.any(constant)):
                    raise ExportError(
                        f"{variable.path}: the input scales of {paths[group.targets[0]]} are to be "
                        "folded into it, but a Hugging Face checkpoint has no place for it; give "
                        "this layer gptq, or use --format dense"
                    )
            found |= {paths[name]: group.fold for name in group.targets}
    return found


def divisors(
    folds: Mapping[str, Fold],
    layers: Mapping[str, Mapping[str, NDArray[Any]]],
    schemes: Mapping[str, Scheme],
    layouts: Mapping[str, KernelLayout],
) -> dict[str, Divisor]:
    """What each variable is to be divided by, by its path.

    Args:
        layers: the variables of each layer of a part, by name.
        layouts: of kernels, by variable path.

    Raises:
        ExportError: input scales that are not those of the plan.
    """
    found: dict[str, Divisor] = {}
    for layer, variables in layers.items():
        if _SCALES not in variables:
            continue
        groups = row_groups(layouts[f"{layer}/kernel"], schemes[layer], layer)
        rows = None if groups is None else groups.input_of_row()
        scale_C = _of_inputs(variables[_SCALES].astype(np.float32), rows, layer)
        variables_to_divide = folds[layer].variables if layer in folds else ()
        if not variables_to_divide and not (scale_C == 1).all():
            raise _foreign(layer)
        for variable in variables_to_divide:
            known = found.setdefault(variable.path, Divisor(variable, scale_C))
            if not np.array_equal(known.scale_C, scale_C):
                raise _foreign(layer)
    return found


def _of_inputs(
    scale: NDArray[np.float32], input_of_row: Sequence[int] | NDArray[np.intp] | None, layer: str
) -> NDArray[np.float32]:
    """The scale of each input, of one for each stored row."""
    if input_of_row is None:
        return scale
    scale_C = np.empty(int(np.max(input_of_row)) + 1, np.float32)
    scale_C[input_of_row] = scale
    if not np.array_equal(scale_C[input_of_row], scale):
        raise _foreign(layer)
    return scale_C


def _foreign(layer: str) -> ExportError:
    return ExportError(
        f"{layer}: its input scales are not those that were planned; the file is not of this recipe"
    )
