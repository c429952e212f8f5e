"""Where a variable of all experts lies in a checkpoint that has a matrix for each.

KerasHub's converters read the tensors of experts one by one, transpose and join them, and stack
those of all experts to one variable. Of such tensors nothing but the names is known, so that they
are given recorded ones (`pipeline.model.recorded_tensors`) of one number each; the recipe is then
carried out with the numbers 0, 1, 2, …, which shows where each row of each tensor lands. Neither a
family nor its names are known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import ExportError
from pipeline.model.recorded_tensors import (
    Made,
    RecordedTensor,
    Step,
    Stored,
    all_steps,
    carried_out,
    joining_axis,
    stored_tensors,
)

_OF_ONE = re.compile(r"\.experts\.\d+\.")
_MOVES = (np.transpose, np.concatenate, np.stack)
"""What is found whatever the sizes of tensors."""
_ROWS, _COLUMNS = 5, 3


def is_of_one_expert(tensor: str) -> bool:
    """Whether a checkpoint's tensor is one expert's."""
    return _OF_ONE.search(tensor) is not None


def of_any_expert(module: str) -> str:
    """A regular expression for a module of one expert, and for the same one of all others."""
    before, _, after = (re.escape(part) for part in _OF_ONE.sub("\n", module).partition("\n"))
    return rf"^{before}\.experts\.\d+\.{after}$"


@dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """A tensor [out_features, in_features] of one expert.

    Attributes:
        variable: path of the variable [experts, in_features, out_features] that holds it.
        expert: its number there.
        start, stop: which of the variable's outputs are the tensor's rows.
        in_features: columns.
    """

    variable: str
    expert: int
    start: int
    stop: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.in_features

    def of(self, variable: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The tensor's value, from the variable's."""
        return variable[self.expert, :, self.start : self.stop].T


def recorded_tensor(name: str, refuse: Callable[[str], ExportError]) -> RecordedTensor:
    """A tensor of one expert, of which only the name is known.

    Args:
        refuse: makes the error for whatever is not recorded.
    """

    def read(stored: Stored) -> Any:
        raise refuse(stored.name)

    return RecordedTensor(Stored(name=name, shape=(1, 1), dtype=np.dtype("float32")), read)


def expert_tensors(
    path: str, shape: tuple[int, int, int], recipe: Step, refuse: Callable[[str], ExportError]
) -> dict[str, ExpertTensor]:
    """The tensors that were stacked to a variable, by name.

    Args:
        path, shape: of the variable, [experts, in_features, out_features].

    Raises:
        ExportError: they are not matrices of one expert each, whose rows are its outputs.
    """
    num_experts, in_features, out_features = shape
    parts: Sequence[Step] = ()
    if isinstance(recipe, Made) and recipe.function is np.stack and joining_axis(recipe) == 0:
        parts = recipe.arguments[0]
    if len(parts) != num_experts:
        raise refuse(stored_tensors(recipe)[0].name)
    found = {}
    for expert, part in enumerate(parts):
        order = _order(part)
        if order is None or out_features % len(order):
            raise refuse(stored_tensors(part)[0].name)
        rows = out_features // len(order)
        for place, name in enumerate(order):
            found[name] = ExpertTensor(
                variable=path,
                expert=expert,
                start=place * rows,
                stop=(place + 1) * rows,
                in_features=in_features,
            )
    return found


def _order(recipe: Step) -> list[str] | None:
    """The tensors [rows, in_features] whose rows are an expert's outputs, in their order.

    None if it is not so, where all have the same number of rows.
    """
    if not all(isinstance(x, Stored) or x.function in _MOVES for x in all_steps(recipe)):
        return None
    names = [tensor.name for tensor in stored_tensors(recipe)]
    numbers = np.arange(len(names) * _ROWS * _COLUMNS).reshape(len(names), _ROWS, _COLUMNS)
    tensors = dict(zip(names, numbers, strict=True))
    try:
        moved = carried_out(recipe, lambda stored: tensors[stored.name])
    except (ValueError, IndexError, TypeError):
        return None
    if moved.shape != (_COLUMNS, len(names) * _ROWS):
        return None
    order = sorted(names, key=lambda name: int(np.argmax(moved[0] == tensors[name][0, 0])))
    in_order = np.concatenate([tensors[name].T for name in order], axis=1)
    return order if np.array_equal(moved, in_order) else None
