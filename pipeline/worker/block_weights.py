"""The weights of the block that a worker is in, on its devices.

Each array is sent to the first of them once, and copied from there to the others. Of a layer that
is solved the stored variables follow, and are decoded there: codes are a fraction of the float
kernel that they stand for. They take its place, unless the float block runs beside the quantized
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jax import Array
from numpy.typing import NDArray

from pipeline.model.targets import Target
from pipeline.plan import LayerPlan
from pipeline.run.worker_api import Values
from pipeline.worker.devices import Devices
from pipeline.worker.model_state import ModelState, place_weights
from quantizer import kernel_layout
from quantizer.expert_codes import ExpertCodes
from quantizer.keras_format.variables import decode_on_device

Stored: TypeAlias = Mapping[str, NDArray[Any]] | ExpertCodes
"""Of a solved layer: what stock Keras stores for it, by name; or the codes of experts."""


class BlockWeights:
    """Holds the weights of one block at a time.

    What they are depends on the block and on which of its layers are solved, and not on what was
    asked before: all results of a layer are the same.
    """

    def __init__(self, model: ModelState, devices: Devices) -> None:
        self._model, self._devices = model, devices
        self._keeps_float = model.plan.has_float_stream
        self._block: int | None = None
        # By the path of the variable, and whether it is other than the source's.
        self._held: dict[tuple[str, bool], Array] = {}
        # On each further device: what is held and its copy, by the id of what is held.
        self._copies: list[dict[int, tuple[Array, Array]]] = [{} for _ in devices.several[1:]]

    def on_each(
        self,
        block: int,
        values: Values,
        solved: Mapping[str, Stored],
        floats: Values = MappingProxyType({}),
    ) -> list[list[Array]]:
        """A block's weights on each device. Arguments as in `of`."""
        first = self.of(block, values, solved, floats)
        return [first, *(self._copied(first, i + 1) for i in range(len(self._copies)))]

    def _copied(self, arrays: Sequence[Array], device: int) -> list[Array]:
        """The arrays on another device, of which only new ones are copied."""
        copies = self._copies[device - 1]
        due = [array for array in arrays if id(array) not in copies]
        for array, copy in zip(due, self._devices.copied(due, device), strict=True):
            copies[id(array)] = array, copy
        return [copies[id(array)][1] for array in arrays]

    def of(
        self,
        block: int,
        values: Values,
        solved: Mapping[str, Stored],
        floats: Values = MappingProxyType({}),
    ) -> list[Array]:
        """A block's weights on the first device, in the order of its layer's.

        Args:
            values: the source's arrays of the block.
            solved: what is stored for the layers solved so far, by path; none of the float block.
            floats: what stays in float, but no longer as it is in the source.
        """
        if block != self._block:
            self.free()
            self._block = block
        targets = self._model.targets(block + 1)
        layers = {
            targets[layer.path].kernel_path: layer
            for layer in self._model.plan.parts[block + 1].layers
            if layer.path in solved and layer.kind == "kernel"
        }
        variables = self._model.graph.blocks[block].layer.weights
        changed = layers.keys() | floats.keys()
        wanted = [(variable.path, variable.path in changed) for variable in variables]
        due = [v for v, one in zip(variables, wanted, strict=True) if one not in self._held]
        if not self._keeps_float:
            # Before others take their place.
            for variable in due:
                self._forget(variable.path, variable.path not in changed)
        unsolved = [v for v in due if v.path not in changed]
        for variable, array in zip(unsolved, place_weights(unsolved, values), strict=True):
            self._held[variable.path, False] = array
        trained = [v for v in due if v.path in floats]
        for variable, array in zip(trained, place_weights(trained, floats), strict=True):
            self._held[variable.path, True] = array
        for variable in due:
            if variable.path in layers:
                layer = layers[variable.path]
                target, stored = targets[layer.path], solved[layer.path]
                kernel = decoded_kernel(
                    target, layer, stored, values[variable.path].dtype, variable
                )
                self._held[variable.path, True] = kernel
        return [self._held[one] for one in wanted]

    def _forget(self, path: str, changed: bool) -> None:
        """Give the memory of a variable back on every device; copies refer to what they are of."""
        gone = self._held.pop((path, changed), None)
        for copies in self._copies:
            copies.pop(id(gone), None)

    def free(self) -> None:
        """Give the devices' memory back, once a block is left."""
        self._block = None
        self._held.clear()
        for copies in self._copies:
            copies.clear()


def decoded_kernel(
    target: Target, layer: LayerPlan, stored: Stored, dtype: np.dtype[Any], variable: Any
) -> Array:
    """The kernel of a solved layer on the device; experts are stored in the source's dtype."""
    if isinstance(stored, ExpertCodes):
        [kernel] = place_weights([variable], {variable.path: stored.kernel(dtype)})
    elif target.num_experts:
        [kernel] = place_weights([variable], dict.fromkeys([variable.path], *stored.values()))
    else:
        assert layer.scheme is not None
        layout = kernel_layout(target.layer)
        kernel = decode_on_device(stored, layout, layer.scheme, variable.dtype)
    return kernel
