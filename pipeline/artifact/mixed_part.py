"""A part of an artifact whose layers come from several runs: their stored arrays, in one file."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifact.parts import Part, encode_part, values_of
from pipeline.artifact.weights_file import read_weights_file
from pipeline.plan import Plan
from pipeline.run.commits import committed_codes, committed_file
from pipeline.run.records import codes_key, file_key
from pipeline.run.worker_api import PartsOfRuns
from pipeline.storage.object_store import open_store
from quantizer.schemes import Float8Scheme

_WIDEST = 4
"""What stands for a weight takes less than so many times its bytes in the source, which are two at
least: a code of a byte, and its share of scales and zero points; or a float32, if that is asked
for."""
_SMALL = 1 << 20


def composed_file(of: PartsOfRuns, parts: Sequence[Part], number: int) -> bytes:
    """A part's file of weights, from the committed files of the runs that give it.

    Args:
        parts: of the composed model.

    Raises:
        DamagedObjectError: a run's file is not what it committed.
    """
    base = committed_file(open_store(of.run_urls[number]), number)
    others = [one for one in of.layers if one.part == number]
    if not others:
        return base
    given = [(committed_file(open_store(one.url), number), one.layers) for one in others]
    return mixed_file(of.plan, parts[number], base, given)


def composed_files(of: PartsOfRuns, parts: Sequence[Part], number: int) -> dict[str, bytes]:
    """A part's file of weights and, if it has experts with codes, that of codes, by storage key."""
    files = {file_key(number): composed_file(of, parts, number)}
    experts = {layer.path for layer in of.plan.parts[number].layers if layer.experts}
    urls = [x.url for x in of.layers if x.part == number and experts.intersection(x.layers)]
    # All experts of a block are of one run.
    codes = committed_codes(open_store(urls[0] if urls else of.run_urls[number]), number)
    return files if codes is None else files | {codes_key(number): codes}


def mixed_file(
    plan: Plan, part: Part, base: bytes, others: Sequence[tuple[bytes, Sequence[str]]]
) -> bytes:
    """The file of a part: of some layers the arrays of other files, and all else of one.

    Args:
        plan: whose schemes are those that the layers have where they come from.
        others: files of the same part, each with the paths of its layers.

    Raises:
        ArtifactError: an array is not of the shape and dtype that the plan's scheme has.
    """
    planned = plan.parts[part.number]
    room = _WIDEST * planned.source_bytes + _SMALL
    # All variables of a layer are in one group; a bank of experts is a variable of one.
    groups = {stored.layer_path: stored.h5_group for stored in part.variables}
    groups |= {str(stored.variable.path): stored.h5_group for stored in part.variables}
    arrays = read_weights_file(base, max_bytes=room)
    for data, layers in others:
        theirs = read_weights_file(data, max_bytes=room)
        arrays |= {groups[path]: theirs[groups[path]] for path in layers}
    float8 = {layer.path for layer in planned.layers if isinstance(layer.scheme, Float8Scheme)}
    compressed = set() if plan.weights_format == 1 else float8
    return encode_part(part, values_of(part, arrays), compressed_layers=compressed)
