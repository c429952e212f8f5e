"""Which calibration windows are held back, so that what was made of the others is judged on them.

What fits its own windows better may answer worse on any other text. Choices that could fit too
well are therefore made on windows that had no part in what is chosen from: one micro-batch in
eight, spread evenly, since neighbouring windows may be of one text, and in turn at every place of
the eight, since windows of several sources alternate. Micro-batches are held back whole, so that
nothing has to be masked; which ones is part of the plan, whoever holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import RecipeError
from pipeline.plan import LayerPlan
from pipeline.recipe.recipe import Recipe
from pipeline.tokens_plan import TokensPlan

_EVERY = 8


def held_back_every(
    recipe: Recipe, blocks: Sequence[Sequence[LayerPlan]], tokens: TokensPlan
) -> int:
    """How often a micro-batch is held back (`TokensPlan.held_back_every`); 0 if none needs to be.

    Raises:
        RecipeError: there is a single micro-batch, of which nothing can be held back.
    """
    judged = _judged(recipe, [layer for layers in blocks for layer in layers])
    if not judged:
        return 0
    num_batches = -(-tokens.num_samples // tokens.micro_batch)
    if num_batches < 2:
        raise RecipeError(
            f"recipe {recipe.name}: {judged} is judged on calibration windows that are held back, "
            f"but all {tokens.num_samples} pass the blocks at once; give num_samples more than "
            f"{tokens.micro_batch}, or leave {judged} out"
        )
    return min(_EVERY, num_batches)


def _judged(recipe: Recipe, layers: Sequence[LayerPlan]) -> str:
    """The first option of the recipe that is judged; "" if none is."""
    if recipe.tuning is not None:
        return "tuning"
    return "drift_correction" if any(layer.corrects_drift for layer in layers) else ""
