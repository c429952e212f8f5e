"""Where a variable of all experts lies in a checkpoint that has a matrix for each.

KerasHub's converters read the tensors of experts one by one, transpose and join them, and stack
those of all experts to one variable. They are given stand-ins that only record what NumPy is asked
to do with them (NEP 18); what was recorded for one expert is then done with the numbers 0, 1, 2, …,
which shows where each row of each tensor lands. Neither a family nor its names are known here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from pipeline.errors import ExportError

_OF_ONE = re.compile(r"\.experts\.\d+\.")
_MOVES: dict[Hashable, Callable[..., Any]] = {
    "transpose": np.transpose,
    "concatenate": np.concatenate,
    "stack": np.stack,
}
_Recorded = tuple[Any, ...]
"""("tensor", number) or (function, arguments, options), nested."""


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


@dataclass(frozen=True)
class StandIn:
    """A tensor whose values are not known, or what NumPy made of several.

    Attributes:
        refuse: makes the error for whatever is not recorded.
        tensors: their names, in the order in which `recorded` numbers them.
    """

    refuse: Callable[[str], ExportError] = field(repr=False)
    tensors: tuple[str, ...]
    recorded: _Recorded = ("tensor", 0)

    def __array_function__(
        self, function: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> StandIn:
        name = function.__name__
        if name not in _MOVES:
            raise self.refuse(self.tensors[0])
        tensors: list[str] = []
        parts = list(args[0]) if isinstance(args[0], list | tuple) else [args[0]]
        recorded = []
        for part in parts:
            if not isinstance(part, StandIn):
                raise self.refuse(self.tensors[0])
            recorded.append(_renumbered(part.recorded, len(tensors)))
            tensors += part.tensors
        taken = tuple(recorded) if isinstance(args[0], list | tuple) else recorded[0]
        options = (*args[1:], tuple(sorted(kwargs.items())))
        return StandIn(self.refuse, tuple(tensors), (name, taken, options))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.refuse(self.tensors[0])


@contextlib.contextmanager
def assigned(variables: Sequence[Any], stacked: dict[str, StandIn]) -> Iterator[None]:
    """Collect the stand-ins that are assigned to variables, by path."""

    def assign(variable: Any, given: Any) -> Any:
        if isinstance(given, StandIn):
            stacked[str(variable.path)] = given
            return None
        return type(variable).assign(variable, given)

    watched = [variable for variable in variables if len(variable.shape) == 3]
    for variable in watched:
        object.__setattr__(variable, "assign", partial(assign, variable))
    try:
        yield
    finally:
        for variable in watched:
            object.__delattr__(variable, "assign")


def _renumbered(recorded: _Recorded, first: int) -> _Recorded:
    kind, taken, *options = recorded
    if kind == "tensor":
        return kind, taken + first
    if kind == "transpose":
        return kind, _renumbered(taken, first), *options
    return kind, tuple(_renumbered(part, first) for part in taken), *options


def expert_tensors(
    path: str, shape: tuple[int, int, int], value: StandIn
) -> dict[str, ExpertTensor]:
    """The tensors that were stacked to a variable, by name.

    Args:
        path, shape: of the variable, [experts, in_features, out_features].

    Raises:
        ExportError: they are not matrices of one expert each, whose rows are its outputs.
    """
    num_experts, in_features, out_features = shape
    kind, taken, *options = value.recorded
    if kind != "stack" or options != [((("axis", 0),),)] or len(taken) != num_experts:
        raise value.refuse(value.tensors[0])
    in_each = len(value.tensors) // num_experts
    found = {}
    for expert, part in enumerate(taken):
        rows = _rows(_renumbered(part, -expert * in_each), in_each, in_features, out_features)
        names = value.tensors[expert * in_each : (expert + 1) * in_each]
        if rows is None:
            raise value.refuse(names[0])
        for name, (start, stop) in zip(names, rows, strict=True):
            found[name] = ExpertTensor(
                variable=path, expert=expert, start=start, stop=stop, in_features=in_features
            )
    return found


@cache
def _rows(
    recorded: _Recorded, num_tensors: int, in_features: int, out_features: int
) -> list[tuple[int, int]] | None:
    """Which outputs of an expert each of its tensors [rows, in_features] gives.

    None if it is not so, where all have the same number of rows.
    """
    each = out_features // num_tensors
    numbers = np.arange(out_features * in_features, dtype=np.int64)
    tensors = numbers.reshape(num_tensors, each, in_features)
    try:
        moved = _done(recorded, tensors)
    except (ValueError, IndexError, TypeError):
        return None
    if moved.shape != (in_features, out_features):
        return None
    found = []
    for tensor in tensors:
        # The variable's outputs are its last axis, and the first number of each row its first.
        starts = np.flatnonzero(moved[0] == tensor[0, 0])
        if len(starts) != 1:
            return None
        start = int(starts[0])
        if not np.array_equal(moved[:, start : start + each].T, tensor):
            return None
        found.append((start, start + each))
    return found


def _done(recorded: _Recorded, tensors: np.ndarray[Any, Any]) -> Any:
    """What was recorded, done with these tensors."""
    kind, taken, *rest = recorded
    if kind == "tensor":
        return tensors[taken]
    [options] = rest
    *args, named = options
    if kind == "transpose":
        return np.transpose(_done(taken, tensors), *args, **dict(named))
    return _MOVES[kind]([_done(part, tensors) for part in taken], *args, **dict(named))
