"""What the stages' work is for one unit of what a plan counts, on CPUs and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the stages' work is, for one unit of what the plan counts.

    Those of CPUs were measured (`tests.benchmarks.costs`), on models of other shapes than the one
    that they are checked on; those of GPUs follow from the programs, and are unmeasured.

    Attributes:
        linear, attention, gram, factor, columns: what a product's flops count for, where they are
            slower than large products alone.
        forward_passes: over what enters and leaves each layer: norms, activations, residuals.
        gram_passes: over a Gram for each micro-batch that is added.
        grid_passes: over a weight, to find its grid; searched_grid_passes with a search.
        column_passes: over a weight in the column loop, and in each sweep.
        column_steps: for each column, in the loop and in each sweep.
        decode_passes: over a weight, from codes to floats.
    """

    linear: float
    attention: float
    gram: float
    factor: float
    columns: float
    forward_passes: float
    gram_passes: float
    grid_passes: float
    searched_grid_passes: float
    column_passes: float
    column_steps: float
    decode_passes: float


CONSTANTS: dict[Device, Constants] = {
    "cpu": Constants(
        linear=1.0,
        attention=1.7,
        gram=1.0,
        factor=2.5,
        columns=1.0,
        forward_passes=3.5,
        gram_passes=2.0,
        grid_passes=20.0,
        searched_grid_passes=22.0,
        column_passes=20.0,
        column_steps=0.5,
        decode_passes=6.0,
    ),
    "gpu": Constants(
        linear=1.0,
        attention=2.0,
        gram=1.0,
        factor=1.0,
        columns=1.2,
        forward_passes=3.0,
        gram_passes=2.0,
        grid_passes=4.0,
        # Thirty tries, of which each reads the weight once and writes nothing.
        searched_grid_passes=34.0,
        column_passes=6.0,
        # One kernel a block of at most 144 columns, with four smaller programs around it; inside it
        # columns follow each other in about a quarter of the time of a launch.
        column_steps=0.25 + 5 / 144,
        decode_passes=2.0,
    ),
}
