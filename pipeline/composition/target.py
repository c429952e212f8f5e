"""How large a composition may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict

from pipeline.errors import PipelineError
from pipeline.recipe.auto_recipe import MOST_TARGET_BITS
from pipeline.storage.record import STRICT

if TYPE_CHECKING:
    from pipeline.composition.composed_plan import GivenRun


@dataclass(frozen=True, kw_only=True)
class Target:
    """How large a composition may be: one of the two.

    Attributes:
        bits: of a weight in the blocks' matrices, as stored: with scales, zero points and all else
            in the blocks' files.
        num_bytes: of all weights files.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bits: float | None = None
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.num_bytes is None):
            raise PipelineError("give --target-bits or --target-bytes, and not both")
        if not 0 < (self.bits or self.num_bytes or 0) < math.inf:
            raise PipelineError(f"{self}: a target is more than 0")
        if self.bits is not None and self.bits > MOST_TARGET_BITS:
            raise PipelineError(
                f"{self}: no weight takes more than {MOST_TARGET_BITS} bits; --target-bytes counts "
                "bytes"
            )

    def __str__(self) -> str:
        if self.bits is not None:
            return f"--target-bits {self.bits}"
        return f"--target-bytes {self.num_bytes}"

    @property
    def recipe_name(self) -> str:
        """What a composition's recipe is called."""
        bits = None if self.bits is None else f"composed-{self.bits:g}-bits"
        return bits or f"composed-{self.num_bytes}-bytes"

    def block_bytes(self, run: GivenRun) -> int:
        """The most that all blocks together may take.

        Args:
            run: any of those that the composition is made of.
        """
        outside = sum(file.size_bytes for file in run.records[0].files.values())
        return self.bytes_of_blocks(block_weights(run), outside)

    def bytes_of_blocks(self, num_weights: int, outside_bytes: float) -> int:
        """The same, of sizes.

        Args:
            num_weights: elements of the blocks' matrices.
            outside_bytes: of what is outside the blocks, as stored.
        """
        if self.bits is not None:
            return math.floor(self.bits * num_weights / 8)
        assert self.num_bytes is not None
        return math.floor(self.num_bytes - outside_bytes)


def block_weights(run: GivenRun) -> int:
    """Elements of the blocks' matrices."""
    return sum(part.num_weights for part in run.plan.parts[1:])
