"""Which variables of a block take up the input scales of a foldable awq, and how.

awq multiplies a layer's inputs' weights by scales, so its input has to be divided by them. A fold
divides what gives that input, such as the weight of the norm before, or the rows of the layer
before: then the runtime needs to know of no scales. `pipeline.planning.folds` finds
folds, and `pipeline.export.folding` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from pipeline.storage.record import STRICT


@dataclass(frozen=True, kw_only=True)
class FoldedVariable:
    """A variable to divide by the scales of a layer's inputs.

    Attributes:
        strides: how far one step along each of its axes goes among the inputs; 0 along axes where
            the scale stays the same.
        offset: what the model adds to it before it uses it: Gemma's norms multiply by 1 + weight.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    strides: tuple[int, ...]
    offset: float = 0.0

    def scale_of(
        self, shape: Sequence[int], scale_C: NDArray[np.floating[Any]]
    ) -> NDArray[np.float64]:
        """The scale of each element, broadcastable over the variable.

        Args:
            shape: the variable's.
            scale_C: of the inputs.
        """
        index = np.zeros((), np.intp)
        for size, stride in zip(shape, self.strides, strict=True):
            index = index[..., None] + np.arange(size if stride else 1) * stride
        return scale_C.astype(np.float64)[index]

    def divided(self, value: NDArray[Any], scale_C: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """The variable with the scales taken up, float32: rounded once."""
        scale = self.scale_of(value.shape, scale_C)
        divided = (value.astype(np.float64) + self.offset) / scale - self.offset
        return divided.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How the input scales of layers that share an input are taken up.

    Attributes:
        shared: (size, stride) of the inputs that must have one scale: `size` of them, `stride`
            apart. Such as those of query heads that attend to the same values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    variables: tuple[FoldedVariable, ...]
    shared: tuple[tuple[int, int], ...] = ()

    @property
    def paths(self) -> frozenset[str]:
        """Of the variables."""
        return frozenset(variable.path for variable in self.variables)

    def scale_of_input(self, in_features: int) -> NDArray[np.intp]:
        """The number of each input's scale: the first of the inputs that share it."""
        index = np.arange(in_features, dtype=np.intp)
        for size, stride in self.shared:
            index -= index // stride % size * stride
        return index
