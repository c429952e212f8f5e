"""What a converter makes of tensors, recorded as a recipe instead of computed.

Converters of mixtures of experts read each expert's tensors, turn and join them, and assign what
they have stacked; GPT-OSS's also decodes four-bit blocks. Such a tensor is given to them without
its values: NumPy asks it what to do (NEP 13 and 18), and it notes that. The recipe is carried out
when the variable is read, so that no more than one variable's value is ever held. Shapes are known
without reading anything. What is not recorded here is computed at once, from values that are read
then; who reads decides how much may be.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """A tensor of the files."""

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    """np.void for one that cannot be read."""
    decoded: bool = False
    """Stands for the codes of a tensor that is stored as floats, and so has no values."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """A function's result. Steps among its arguments stand for their values."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape | None
    """None where it depends on values."""


Step: TypeAlias = Stored | Made
ReadStored: TypeAlias = Callable[[Stored], NDArray[Any]]


class RecordedTensor(NDArrayOperatorsMixin):
    """A tensor without values, which notes what is done with it."""

    def __init__(self, step: Step, read: ReadStored) -> None:
        self.step = step
        self._read = read  # for what cannot be recorded

    @property
    def shape(self) -> Shape:
        return self._value().shape if self.step.shape is None else self.step.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Any:  # noqa: N802  # NumPy's name
        return self._moved(np.transpose, self)

    def reshape(self, *shape: Any) -> Any:
        return self._moved(np.reshape, self, shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Any:
        return self._moved(np.transpose, self, (axes[0] if len(axes) == 1 else axes) or None)

    def astype(self, dtype: Any) -> RecordedTensor:
        return self._noted(_cast, self, dtype, shape=self.step.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self._value(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, RecordedTensor):
            return self._noted(operator.getitem, self, key, shape=None)
        parts = key if isinstance(key, tuple) else (key,)
        if all(isinstance(part, slice | EllipsisType | None) for part in parts):
            return self._moved(operator.getitem, self, key)
        return self._value()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.step = self._noted(_with_items, self, key, value, shape=self.shape).step

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options or ufunc.nout != 1:
            return getattr(ufunc, method)(*map(self._computed, inputs), **options)
        shapes = [i.step.shape if isinstance(i, RecordedTensor) else np.shape(i) for i in inputs]
        known = [shape for shape in shapes if shape is not None]
        shape = np.broadcast_shapes(*known) if len(known) == len(shapes) else None
        return self._noted(ufunc, *inputs, shape=shape)

    def __array_function__(
        self, function: Any, _types: Any, arguments: Any, options: Mapping[str, Any]
    ) -> Any:
        if function in _VIEWS:
            return self._moved(function, *arguments, **options)
        if function in _SHAPES:
            shape = _SHAPES[function](*arguments, **options)
            return self._noted(function, *arguments, shape=shape, **options)
        values = [self._computed(argument) for argument in arguments]
        return function(*values, **{key: self._computed(options[key]) for key in options})

    def _noted(
        self, function: Any, *arguments: Any, shape: Shape | None, **options: Any
    ) -> RecordedTensor:
        taken = tuple(_steps(argument) for argument in arguments)
        step = Made(function=function, arguments=taken, options=options, shape=shape)
        return RecordedTensor(step, self._read)

    def _moved(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """One of the functions that make views, whose shape is found without memory."""
        first, *others = arguments
        try:
            view = function(np.broadcast_to(np.uint8(0), first.shape), *others, **options)
        except ValueError:
            # It fits no recorded shape: whoever has the values says what is wrong.
            return function(self._computed(first), *others, **options)
        return self._noted(function, *arguments, shape=view.shape, **options)

    def _value(self) -> NDArray[Any]:
        return carried_out(self.step, self._read)

    def _computed(self, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return [self._computed(part) for part in given]
        return given._value() if isinstance(given, RecordedTensor) else given


def _steps(given: Any) -> Any:
    if isinstance(given, list | tuple):
        return type(given)(_steps(part) for part in given)
    return given.step if isinstance(given, RecordedTensor) else given


def _cast(value: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """As `astype`, but no float is rounded: a variable's dtype is decided elsewhere."""
    floats = [keras.backend.is_float_dtype(str(np.dtype(kind))) for kind in (value.dtype, dtype)]
    return value if all(floats) else value.astype(dtype)


def _with_items(value: NDArray[Any], key: Any, items: Any) -> NDArray[Any]:
    value[key] = items
    return value


def _stacked(parts: Sequence[Any], axis: int = 0) -> Shape:
    shape = _equal(parts, [part.shape for part in parts])
    place = axis % (len(shape) + 1)
    return *shape[:place], len(parts), *shape[place:]


def _concatenated(parts: Sequence[Any], axis: int = 0) -> Shape:
    place = axis % len(parts[0].shape)
    others = _equal(parts, [(*part.shape[:place], *part.shape[place + 1 :]) for part in parts])
    return *others[:place], sum(part.shape[place] for part in parts), *others[place:]


def _equal(parts: Sequence[Any], shapes: Sequence[Shape]) -> Shape:
    for part, shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            tensors = stored_tensors(part.step) if isinstance(part, RecordedTensor) else ()
            name = tensors[0].name if tensors else "a part"
            raise ValueError(f"{name} gives {shape}, where {shapes[0]} is expected")
    return shapes[0]


def _repeated(value: Any, repeats: int, axis: int) -> Shape:
    place = axis % len(value.shape)
    return *value.shape[:place], value.shape[place] * repeats, *value.shape[place + 1 :]


_VIEWS = (np.transpose, np.reshape, np.squeeze, np.expand_dims, np.swapaxes, np.moveaxis)
_SHAPES: dict[Any, Callable[..., Shape]] = {
    np.stack: _stacked,
    np.concatenate: _concatenated,
    np.repeat: _repeated,
    np.empty_like: lambda value, **_: value.shape,
}
"""The shapes that functions give which make no views."""
_MOVES = (*_VIEWS, np.stack, np.concatenate, operator.getitem)


def stored_tensors(step: Step) -> tuple[Stored, ...]:
    """The tensors that a recipe takes, each once, in its order."""
    return tuple(found for found in all_steps(step) if isinstance(found, Stored))


def only_moves(step: Step) -> bool:
    """Whether a recipe's values are those of its tensors, none of them selected by another."""
    return all(
        isinstance(found, Stored) or (found.function in _MOVES and found.shape is not None)
        for found in all_steps(step)
    )


def keeps_rows(step: Step) -> bool:
    """Whether a recipe that was recorded for one row of each tensor gives that row of its value.

    A row is what has one index of the first axis.
    """
    return all(_keeps_rows(found) for found in all_steps(step))


def _keeps_rows(step: Step) -> bool:
    if step.shape is None:
        return True  # selected from what has one row, and put back into it
    if not step.shape or step.shape[0] != 1:
        return False
    if isinstance(step, Stored):
        return True
    if step.function is operator.getitem:
        key = step.arguments[1]
        first = key[0] if isinstance(key, tuple) else key
        return first is Ellipsis or first == slice(None)
    return step.function not in (np.stack, np.concatenate, np.repeat) or joining_axis(step) != 0


def all_steps(step: Step) -> Iterator[Step]:
    """A recipe's steps, each once."""
    seen: set[int] = set()
    waiting = [step]
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += reversed(list(_operands(found)))


def _operands(step: Step) -> Iterator[Step]:
    """The steps that a step takes, as often as it does."""
    if isinstance(step, Stored):
        return
    waiting = [*step.options.values(), *reversed(step.arguments)]
    while waiting:
        given = waiting.pop()
        if isinstance(given, Stored | Made):
            yield given
        elif isinstance(given, list | tuple):
            waiting += reversed(given)


def carried_out(step: Step, read: ReadStored) -> NDArray[Any]:
    """A recipe's value; each tensor is read once, and held no longer than it is needed.

    Raises:
        ValueError, IndexError, TypeError: the tensors' shapes do not fit together.
    """
    left = Counter(id(taken) for found in all_steps(step) for taken in _operands(found))
    left[id(step)] += 1
    held: dict[int, Any] = {}

    def value(given: Any) -> Any:
        if isinstance(given, list | tuple):
            return type(given)(value(part) for part in given)
        if not isinstance(given, Stored | Made):
            return given
        if id(given) not in held:
            held[id(given)] = read(given) if isinstance(given, Stored) else made(given)
        left[id(given)] -= 1
        return held[id(given)] if left[id(given)] else held.pop(id(given))

    def made(given: Made) -> Any:
        if given.function is np.stack and joining_axis(given) == 0:
            return stacked(given.shape, (value(part) for part in given.arguments[0]))
        arguments = [value(argument) for argument in given.arguments]
        if given.function is _with_items and left[id(given.arguments[0])]:
            arguments[0] = arguments[0].copy()
        options = {key: value(option) for key, option in given.options.items()}
        return given.function(*arguments, **options)

    return np.asarray(value(step))


def joining_axis(step: Made) -> Any:
    """The axis along which a step joins or repeats: by `np.stack` and others of `_SHAPES`."""
    others = step.arguments[1:] or (0,)
    return step.options.get("axis", others[-1])


def _order_in_memory(value: NDArray[Any]) -> list[int]:
    """Axes, the one with the largest steps first."""
    return sorted(range(value.ndim), key=lambda axis: -value.strides[axis])


def stacked(shape: Shape | None, parts: Iterator[NDArray[Any]]) -> NDArray[Any]:
    """Parts that are stacked to an array of that shape, one by one, as each lies in memory.

    Raises:
        TypeError: they are not all of one dtype.
    """
    assert shape is not None
    first = next(parts)
    order = _order_in_memory(first)
    memory = np.empty((shape[0], *(first.shape[axis] for axis in order)), first.dtype)
    stack = memory.transpose(0, *(1 + order.index(axis) for axis in range(first.ndim)))
    stack[0] = first
    del first
    for index, part in enumerate(parts, 1):
        if part.dtype != stack.dtype:
            raise TypeError(f"{part.dtype} beside {stack.dtype}")
        stack[index] = part
        del part
    return stack
