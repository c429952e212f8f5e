"""A part's file and record, put together of what was solved and what stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from pipeline.artifact.parts import Part, encode_part
from pipeline.canonical import sha256
from pipeline.compute.solving import SolvedLayer, Values
from pipeline.plan import Plan
from pipeline.records import LayerRecord, PartRecord, file_key


def make_part(
    plan: Plan,
    file: Part,
    part: int,
    previous: str,
    values: Values,
    results: Mapping[str, SolvedLayer],
) -> tuple[PartRecord, bytes]:
    """The record of a part, and its file's bytes.

    Args:
        file: what the part's file holds.
        previous: digest of the record of the block before; "" where there is none.
        values: the source's arrays, by variable path.
        results: the solved layers, by path.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path, result in results.items():
        arrays |= file.layer_values(path, result.variables)
    for stored in file.variables:
        if stored.place not in arrays:
            arrays[stored.place] = values[str(stored.variable.path)]
    data = encode_part(file, arrays)
    record = PartRecord(
        part=part,
        plan_digest=plan.digest,
        file=file_key(part),
        sha256=sha256(data),
        size_bytes=len(data),
        loaded_bytes=file.num_bytes,
        previous=previous,
        layers=tuple(
            LayerRecord(
                path=layer.path,
                scheme=layer.scheme,
                account=results[layer.path].account if layer.path in results else None,
                note=layer.note,
            )
            for layer in plan.parts[part].layers
        ),
    )
    return record, data
