"""Count the codes and scales of a solved layer, from what stock Keras stores for it.

In bands, and without unpacking: a layer may have a billion codes, and the block after it is being
captured meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import LayerPlan
from pipeline.run.code_histograms import (
    NUM_CODE_BINS,
    NUM_SCALE_BINS,
    SCALE_OCTAVES,
    CodeHistogram,
)
from pipeline.run.solved_layers import SolvedLayer
from quantizer.expert_codes import code_format
from quantizer.schemes import AWQScheme, Float8Scheme, Int4Scheme, Int8Scheme, Scheme

_BAND = 1 << 20
_TABLES = ("quantized_kernel", "kernel", "embeddings", "reverse_embeddings")
"""Variables of codes; their scales are named for them, but of the first for the second."""

Counts = NDArray[np.int64]


def code_histograms(
    layers: Iterable[LayerPlan], solved: Iterable[SolvedLayer]
) -> dict[str, CodeHistogram]:
    """Those of a part's solved layers that have codes, by path.

    Args:
        layers: of the part.
    """
    planned = {layer.path: layer for layer in layers}
    found = {one.path: code_histogram(planned[one.path], one) for one in solved}
    return {path: one for path, one in found.items() if one is not None}


def code_histogram(layer: LayerPlan, solved: SolvedLayer) -> CodeHistogram | None:
    """Of one layer, an embedding's both tables together; None for float8, which has no codes."""
    scheme = layer.scheme
    if scheme is None or isinstance(scheme, Float8Scheme):
        return None
    bits = 4 if isinstance(scheme, AWQScheme) else code_format(scheme)[0]
    num_codes = 1 << bits
    count_K = np.zeros(num_codes, np.int64)
    scales: list[NDArray[np.float32]] = []
    if solved.codes is not None:
        is_signed = False
        count_K += _counted(solved.codes.codes_ERC)[:num_codes]
        scales.append(_distances(solved.codes.scale_ERG, inverse=False))
    else:
        tables = [name for name in _TABLES if name in solved.variables]
        is_signed = solved.variables[tables[0]].dtype == np.int8
        for name in tables:
            codes = solved.variables[name]
            count_256 = _counted(codes)
            if bits == 4:
                # Two to a byte; a code of 0 fills the last byte up where their number is odd.
                pairs = count_256.reshape(16, 16)
                count_K += pairs.sum(0) + pairs.sum(1)
                count_K[0] -= 2 * codes.size - layer.in_features * layer.out_features
            else:
                count_K += count_256[:num_codes]
            prefix = name.removeprefix("quantized_")
            scales.append(
                _distances(
                    solved.variables[f"{prefix}_scale"], inverse=_divides(scheme, solved, prefix)
                )
            )
    if is_signed:
        count_K = np.roll(count_K, num_codes // 2)  # from the lowest on
    return _histogram(count_K, np.concatenate(scales), is_signed=is_signed, scheme=scheme)


def _divides(scheme: Scheme, solved: SolvedLayer, prefix: str) -> bool:
    """Whether a value is code / scale, as Keras has it where each channel has one, without zero."""
    return isinstance(scheme, Int8Scheme | Int4Scheme) and f"{prefix}_zero" not in solved.variables


def _distances(scale: NDArray[np.generic], *, inverse: bool) -> NDArray[np.float32]:
    """Between the values of neighbouring codes."""
    flat = scale.astype(np.float32).reshape(-1)
    with np.errstate(divide="ignore"):
        return np.float32(1) / flat if inverse else flat


def _counted(codes: NDArray[np.uint8] | NDArray[np.int8]) -> Counts:
    """How often each of the 256 bytes occurs."""
    count_256 = np.zeros(256, np.int64)
    bytes_N = codes.reshape(-1).view(np.uint8)
    for start in range(0, len(bytes_N), _BAND):
        count_256 += np.bincount(bytes_N[start : start + _BAND], minlength=256)
    return count_256


def _histogram(
    count_K: Counts, distances: NDArray[np.float32], *, is_signed: bool, scheme: Scheme
) -> CodeHistogram | None:
    median = np.median(distances)
    if not np.isfinite(median):
        return None
    num_codes = len(count_K)
    num_bins = min(num_codes, max(NUM_CODE_BINS))
    exponents = np.linspace(-SCALE_OCTAVES, SCALE_OCTAVES, NUM_SCALE_BINS + 1)[1:-1]
    places = np.searchsorted(median * 2.0**exponents, distances, side="right")
    # int8's codes begin at -127.
    first = 1 if isinstance(scheme, Int8Scheme) else 0
    return CodeHistogram(
        lowest=-num_codes // 2 if is_signed else 0,
        codes=tuple(count_K.reshape(num_bins, -1).sum(1).tolist()),
        ends=(int(count_K[first]), int(count_K[-1])),
        scale=float(median),
        scales=tuple(np.bincount(places, minlength=NUM_SCALE_BINS).tolist()),
    )
