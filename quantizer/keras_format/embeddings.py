"""From embedding tables to the variables that stock Keras stores for them (int8 and int4).

Each token's vector is one output channel: scales run by token, groups along the vector. An
untied ReversibleEmbedding has a second table for the way back, [vector, tokens].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantizer.errors import LayerError
from quantizer.keras_format.packing import pack_nibbles
from quantizer.result import ChannelWeight, Float32, GroupedWeight, QuantizedWeight, SolveReport
from quantizer.schemes import Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import solve

Variables = dict[str, NDArray[Any]]


def solve_embeddings(
    table_VD: Float32,
    reverse_DV: Float32 | None,
    scheme: Scheme,
    *,
    scale_dtype: str = "float32",
    name: str = "embedding",
) -> tuple[Variables, SolveReport]:
    """Quantize an Embedding or ReversibleEmbedding.

    Args:
        table_VD: [tokens, vector], float32.
        reverse_DV: the untied way back, [vector, tokens]; None when tied or absent.
        scale_dtype: the layer's variable dtype.
        name: the layer, for messages.

    Returns:
        The variables, and the report of the table (the way back is rounded alike).

    Raises:
        LayerError: a scheme that stock Keras has no embedding for.
        WeightError: NaN or infinity.
    """
    if not isinstance(scheme, Int8Scheme | Int4Scheme):
        raise LayerError(
            f"{name}: stock Keras quantizes embeddings to int8 or int4 only, not "
            f"{scheme.mode}; exclude the layer, or give it Int8Scheme or Int4Scheme"
        )
    solution = solve(table_VD, None, scheme, scale_dtype=scale_dtype, name=name)
    bits = 8 if isinstance(scheme, Int8Scheme) else 4
    variables = _stored("embeddings", solution.weight, bits=bits, transposed=False)
    if reverse_DV is not None:
        reverse = solve(reverse_DV.T, None, scheme, scale_dtype=scale_dtype, name=name)
        variables |= _stored("reverse_embeddings", reverse.weight, bits=bits, transposed=True)
    return variables, solution.report


def _stored(prefix: str, weight: QuantizedWeight, *, bits: int, transposed: bool) -> Variables:
    """One table's variables; the way back is stored transposed, its vectors along axis 0."""

    def place(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array.T if transposed else array)

    assert isinstance(weight, ChannelWeight | GroupedWeight)
    codes = place(weight.codes_RC)
    variables = {prefix: pack_nibbles(codes, axis=0 if transposed else -1) if bits == 4 else codes}
    if isinstance(weight, ChannelWeight):
        return variables | {f"{prefix}_scale": weight.scale_R}
    variables |= {
        f"{prefix}_scale": place(weight.scale_RG),
        f"{prefix}_zero": place(weight.zero_RG),
    }
    # One map of vector entries to groups serves both tables.
    return variables | ({} if transposed else {"g_idx": weight.group_C.astype(np.float32)})
