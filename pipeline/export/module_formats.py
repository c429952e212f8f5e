"""The format of every quantized module of a checkpoint, and which layers have none."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, ExportFormat
from pipeline.export.codes import Matrix, awq_refused, join_matrix, kernel_codes
from pipeline.export.experts import expert_format
from pipeline.export.folding import Divisor
from pipeline.model.tensor_places import TensorPlace, TensorPlaces
from pipeline.model.weight_layout import StoredVariable
from quantizer.schemes import AWQScheme, GPTQScheme, Int4Scheme, Scheme

if TYPE_CHECKING:
    from pipeline.export.checkpoint import Checkpoint


def module_formats(checkpoint: Checkpoint) -> dict[str, CodeFormat]:
    """The format of each module's codes, found by moving zeros to where the codes will go."""
    known: dict[Hashable, CodeFormat] = {}
    found = {}
    for number, of_part in enumerate(checkpoint.tensors):
        variables: dict[str, list[StoredVariable]] = {}
        for stored in checkpoint.parts[number].variables:
            variables.setdefault(stored.layer_path, []).append(stored)
        for place in of_part:
            expert = checkpoint.places.experts.get(place.name)
            if expert is not None:
                module = checkpoint.names[place.name].rpartition(".")[0]
                scheme = checkpoint.schemes.get(expert.variable)
                if scheme is not None:
                    found[module] = expert_format(expert, scheme, checkpoint.format)
                continue
            _check_stacked(place, checkpoint.schemes)
            layers = [path.rpartition("/")[0] for path in place.variables]
            schemes = [checkpoint.schemes.get(layer) for layer in layers]
            if place.input_axis is None or not any(schemes):
                continue
            _check_layers(place, layers, schemes, checkpoint.format)
            key = (checkpoint.places.signature(place.name), *map(repr, schemes))
            if key not in known:
                own = {
                    layer: _stand_ins(variables[layer], checkpoint.schemes[layer])
                    for layer in layers
                }
                known[key] = joined_kernels(
                    checkpoint.places, place, checkpoint.schemes, own, {}
                ).format
            found[checkpoint.names[place.name].rpartition(".")[0]] = known[key]
    return found


def _check_stacked(place: TensorPlace, schemes: Mapping[str, Scheme]) -> None:
    bank = next((path for path in place.variables if path in schemes), None)
    if bank is not None:
        raise ExportError(
            f"{bank}: transformers has {place.name} for all experts together, and no format with "
            "codes for it; leave experts of this family in float, or use --format dense"
        )


def _check_layers(
    place: TensorPlace,
    layers: Sequence[str],
    schemes: Sequence[Scheme | None],
    as_format: ExportFormat,
) -> None:
    for layer, scheme in zip(layers, schemes, strict=True):
        if isinstance(scheme, AWQScheme) and not scheme.foldable:
            raise awq_refused(layer)
        if scheme is None:
            raise ExportError(
                f"{layer}: not quantized, but {place.name} holds it together with "
                f"{', '.join(x for x in layers if x != layer)}; quantize all of them by one "
                "scheme, or use --format dense"
            )
    if place.input_axis == 0 and as_format == "compressed-tensors":
        raise ExportError(
            f"{layers[0]}: transformers has {place.name} in a Conv1D, which compressed-tensors "
            "cannot hold; use --format gptq or dense"
        )


def _stand_ins(stored: Sequence[StoredVariable], scheme: Scheme) -> dict[str, NDArray[Any]]:
    """Variables of the right shapes, with the groups that the scheme has and any codes."""
    made = {one.name: np.zeros(one.shape, np.dtype(one.dtype)) for one in stored}
    size, zero = -1, 0
    match scheme:
        case GPTQScheme():
            size = scheme.group_size
            zero = 2 ** (scheme.weight_bits - 1) if scheme.symmetric else 0
        case AWQScheme():
            size = scheme.group_size
        case Int4Scheme():
            size = scheme.block_size
    for name, value in made.items():
        if name == "g_idx":
            value[:] = np.arange(value.size) // (value.size if size == -1 else size)
        elif name == "kernel_zero":
            value[...] = zero
        elif name.endswith("_scale"):
            value[...] = 1
    return made


def joined_kernels(
    places: TensorPlaces,
    place: TensorPlace,
    schemes: Mapping[str, Scheme],
    own: Mapping[str, Mapping[str, NDArray[Any]]],
    divisors: Mapping[str, Divisor],
) -> Matrix:
    """The matrix of a tensor, from the layers that it holds.

    Args:
        own: each layer's variables, by its path and their names.
        divisors: what is to be folded into their scales.
    """
    kernels = {}
    for path in place.variables:
        layer = path.rpartition("/")[0]
        kernel = kernel_codes(own[layer], places.layouts[path], schemes[layer], layer)
        divisor = divisors.get(path)
        kernels[path] = kernel if divisor is None else divisor.divided_codes(kernel)
    return join_matrix(place, places, kernels)
