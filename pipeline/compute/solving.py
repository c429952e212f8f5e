"""Solve the layers of one part: those that share an input together, embeddings on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import LayerPlan
from pipeline.source.quantizable import Target
from quantizer import HessianSum, MagnitudeSum, kernel_layout, scheme_from_dict
from quantizer.embeddings import solve_embeddings
from quantizer.restore import restore_kernel
from quantizer.solution import Float32
from quantizer.stored import solve_kernels

Values = Mapping[str, NDArray[Any]]
"""A source's arrays by the path of their variable."""


@dataclass(frozen=True, kw_only=True)
class SolvedLayer:
    """One layer's result.

    Attributes:
        path: Keras' path of the layer.
        variables: what stock Keras stores for it, by the layer's own names.
        account: the solver's, as plain JSON values.
        kernel: what the variables stand for, as later layers meet it; None of an embedding.
    """

    path: str
    variables: dict[str, NDArray[Any]]
    account: dict[str, Any]
    kernel: Float32 | None


def solve_layers(
    targets: Mapping[str, Target],
    layers: Sequence[LayerPlan],
    values: Values,
    sums: HessianSum | MagnitudeSum | None,
) -> list[SolvedLayer]:
    """Quantize layers that share an input, or that need to know nothing of theirs.

    Args:
        targets: the part's layers by path.
        layers: those to solve; all have a scheme.
        values: the source's arrays.
        sums: of the shared input.

    Raises:
        QuantizationError: with the layer's path.
    """
    kernels = [layer for layer in layers if layer.kind == "kernel"]
    solved = {}
    by_scheme: dict[str, list[LayerPlan]] = {}
    for layer in kernels:
        by_scheme.setdefault(repr(layer.scheme), []).append(layer)
    for alike in by_scheme.values():
        assert alike[0].scheme is not None
        scheme = scheme_from_dict(alike[0].scheme)
        layouts = [kernel_layout(targets[layer.path].layer) for layer in alike]
        found = solve_kernels(
            [_float32(values[targets[layer.path].layer._kernel.path]) for layer in alike],
            layouts,
            scheme,
            sums,
            scale_dtype=[_dtype(targets[layer.path], values) for layer in alike],
            names=[layer.path for layer in alike],
        )
        for layer, layout, (variables, account) in zip(alike, layouts, found, strict=True):
            solved[layer.path] = SolvedLayer(
                path=layer.path,
                variables=variables,
                account=account.to_dict(),
                kernel=restore_kernel(variables, layout, scheme),
            )
    for layer in layers:
        if layer.kind == "embedding":
            solved[layer.path] = _solve_table(targets[layer.path], layer, values)
    return [solved[layer.path] for layer in layers]


def _solve_table(target: Target, layer: LayerPlan, values: Values) -> SolvedLayer:
    assert layer.scheme is not None
    reverse = getattr(target.layer, "reverse_embeddings", None)
    table = values[target.layer._embeddings.path]
    variables, account = solve_embeddings(
        _float32(table),
        None if reverse is None else _float32(values[reverse.path]),
        scheme_from_dict(layer.scheme),
        scale_dtype=str(table.dtype),
        name=layer.path,
    )
    return SolvedLayer(path=layer.path, variables=variables, account=account.to_dict(), kernel=None)


def _dtype(target: Target, values: Values) -> str:
    return str(values[target.layer._kernel.path].dtype)


def _float32(array: NDArray[Any]) -> Float32:
    return np.asarray(array, dtype=np.float32)
