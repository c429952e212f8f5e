"""What training blocks takes: layers to train, windows, and memory of the worker that does it.

Gradients take twice the products of the forward pass. Beside the block, that worker holds what is
trained, its moments and gradients, what the block computes for a micro-batch, all of which the way
back needs, and all windows that it trains on, in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import RecipeError
from pipeline.plan import LayerPlan, PartPlan, Plan
from pipeline.recipe.recipe import Recipe

_FLOAT_BYTES = 4
# Of a weight, in float32: its offset, two moments, the gradient's sum and its next term, the
# decoded weight and its gradient; its code in a byte.
_TRAINED_BYTES = 7 * _FLOAT_BYTES + 1
# What goes into and comes out of a layer, with as much in between (norms, activation functions).
_KEPT_COPIES = 2
# Attention's scores, before and after the softmax, and their gradient.
_SCORE_COPIES = 3
GRADIENT_FORWARDS = 3
"""Forward passes that take as long as one with its gradient."""


def check_trained(recipe: Recipe, blocks: Sequence[Sequence[LayerPlan]]) -> None:
    """Refuse tuning where there is nothing to tune.

    Raises:
        RecipeError: says what tuning is for.
    """
    if recipe.tuning is None or any(x.is_trainable for layers in blocks for x in layers):
        return
    raise RecipeError(
        f"recipe {recipe.name}: tuning trains layers of blocks that gptq has solved, other than "
        "experts, and in this model none is; give such layers {mode: gptq}, or leave tuning out"
    )


def trained_windows(plan: Plan) -> int:
    """Windows of all steps of one block; 0 if nothing is trained."""
    tuning, tokens = plan.recipe.tuning, plan.tokens
    if tuning is None or tokens is None:
        return 0
    return tuning.steps * max(1, tuning.batch // tokens.micro_batch) * tokens.micro_batch


def judged_windows(plan: Plan) -> int:
    """Windows that a block runs on to judge it, before and after."""
    trains = plan.recipe.tuning is not None and plan.tokens is not None
    return 2 * plan.tokens.num_held_back if trains and plan.tokens is not None else 0


def trained_weights(part: PartPlan) -> int:
    """Weights of a block that are trained; norms are none to speak of."""
    return sum(layer.num_weights for layer in part.layers if layer.is_trainable)


def tuning_bytes(plan: Plan, largest_array_bytes: int) -> int:
    """Of a worker's device while it trains, beside the block's weights.

    Args:
        largest_array_bytes: of what a block computes for a micro-batch.
    """
    tokens = plan.tokens
    if plan.recipe.tuning is None or tokens is None:
        return 0
    batch = tokens.micro_batch * tokens.sequence_length
    passed = max(sum(x.in_features + x.num_rows for x in part.layers) for part in plan.parts[1:])
    trained = max(map(trained_weights, plan.parts[1:]))
    return (
        _TRAINED_BYTES * trained
        + _KEPT_COPIES * _FLOAT_BYTES * batch * passed
        + _SCORE_COPIES * largest_array_bytes
    )


def tuning_window_bytes(plan: Plan, window_bytes: int) -> int:
    """Of the windows that the worker that trains holds on its host: what a block takes and gives.

    Args:
        window_bytes: of one window between two blocks.
    """
    if plan.recipe.tuning is None or plan.tokens is None:
        return 0
    tokens = plan.tokens
    used = min(trained_windows(plan), tokens.num_samples - tokens.num_held_back)
    return 2 * (used + tokens.num_held_back) * window_bytes
