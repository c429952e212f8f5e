"""Which sums over the float model's inputs are stored, for all recipes of a model.

Sums of all kernels are, so that no recipe decides what is captured: one finds what another has
made. Whatever cannot be solved on them is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import RecipeError, SourceError
from pipeline.model.blocks import BlockGraph
from pipeline.model.inputs import InputLayout
from pipeline.plan import InputGroup, LayerPlan
from pipeline.planning.input_groups import input_groups
from pipeline.recipe.recipe import Recipe, statistics_of
from pipeline.run.sums_records import sums_bytes
from pipeline.worker.block_memory import BlockMemory

Groups: TypeAlias = Sequence[tuple[InputGroup, ...]]
"""Of every block."""

_LARGEST_FILE_BYTES = 5 << 30
"""What object storage takes in one write."""


def captured_groups(
    recipe: Recipe,
    graph: BlockGraph,
    layout: InputLayout,
    layers: Sequence[Sequence[LayerPlan]],
    windows: TokenWindows,
    micro_batch: int,
) -> tuple[Groups, BlockMemory]:
    """The inputs of every block whose sums are stored, and what any block needs meanwhile.

    Args:
        layers: of each block, by the recipe.

    Raises:
        RecipeError: the recipe needs sums that are not stored, or they cannot be taken or kept.
    """
    experts = [x for block in layers for x in block if x.experts and statistics_of(x.scheme)]
    if experts:
        raise RecipeError(
            f"recipe {recipe.name}: {experts[0].path}: experts are calibrated on the tokens that "
            "the quantized model sends to them, of which statistics: float stores no sums; give "
            "them int8, int4 or null by a rule, or leave statistics out"
        )
    try:
        groups, memory = input_groups(graph, layout, layers, windows, micro_batch, of_all=True)
    except SourceError as error:
        raise RecipeError(
            f"recipe {recipe.name}: statistics: float takes the inputs of all kernels, also of "
            f"those that the recipe leaves in float, and that fails: {error}. Leave statistics out"
        ) from error
    for block, own in zip(graph.blocks, groups, strict=True):
        if (size := sums_bytes(own)) > _LARGEST_FILE_BYTES:
            raise RecipeError(
                f"recipe {recipe.name}: {block.name}: the sums over its inputs have {size:,} "
                f"bytes, and a file of statistics at most {_LARGEST_FILE_BYTES:,}; leave "
                "statistics out"
            )
    return groups, memory
