"""What in a program can be divided by scales, so that one of its values is, and nothing else.

A value is followed back through operations that a scale passes: sums pass it to all that they add,
products to one factor, layers to the rows of their kernels. A way back that ends in weights is one
to scale the value, provided that whatever is scaled on it goes nowhere else. No kind of layer is
named: a norm's weight, its bias, a gated layer's rows or the values of attention are found alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from pipeline.planning.flat_program import FlatProgram, Operation

Strides = tuple[int, ...]
"""How far one step along each axis of a value goes among the scales; 0: they stay the same."""

_PASSED = ("convert_element_type", "copy", "stop_gradient", "reduce_precision")
_MOVES = ("reshape", "transpose", "broadcast_in_dim", "squeeze")
# Blocks need far fewer ways and steps; more are not looked for.
_MOST_WAYS = 64
_MOST_STEPS = 200

_Shared = frozenset[tuple[int, int]]


@dataclass(frozen=True)
class _Need:
    """An operand that has to be scaled."""

    position: int
    strides: Strides
    shared: _Shared = frozenset()
    offset: float = 0.0


@dataclass(frozen=True)
class ScalePath:
    """One way to divide a value by scales.

    Attributes:
        values: every value that is scaled on it: its strides, and what is added to it before it is.
        uses: operations and positions at which they are taken.
        arguments: of these values, those that the program is given.
        shared: (size, stride) of scales that must be equal.
    """

    values: Mapping[int, tuple[Strides, float]]
    uses: frozenset[tuple[int, int]]
    arguments: tuple[int, ...]
    shared: _Shared

    def joined(self, other: ScalePath) -> ScalePath | None:
        """Both at once; None if they contradict each other."""
        if any(self.values.get(v, wanted) != wanted for v, wanted in other.values.items()):
            return None
        return ScalePath(
            {**self.values, **other.values},
            self.uses | other.uses,
            tuple(dict.fromkeys(self.arguments + other.arguments)),
            self.shared | other.shared,
        )


class ScalePaths:
    """The ways to scale values of one program by dividing some of its arguments."""

    def __init__(self, program: FlatProgram, divisible: Sequence[int]) -> None:
        """Follows nothing yet.

        Args:
            divisible: arguments that may be divided: weights.
        """
        self._program = program
        self._divisible = frozenset(divisible)
        self._known: dict[tuple[int, Strides, float], tuple[ScalePath, ...]] = {}

    def to(self, value: int, strides: Strides) -> list[ScalePath]:
        """The ways to scale this value, those with the most scales first."""
        plain = tuple(
            stride if size > 1 else 0
            for stride, size in zip(strides, self._program.shapes[value], strict=True)
        )
        ways = self._ways(value, plain, 0.0)
        return sorted(ways, key=lambda way: len(way.shared))

    def leaks(self, path: ScalePath, end: int, kept: Sequence[int]) -> bool:
        """Whether anything scaled on a path goes elsewhere.

        Args:
            end: the path's last value, whose users are not asked.
            kept: values that must not be scaled.
        """
        return any(
            value in kept or not path.uses.issuperset(self._program.users.get(value, ()))
            for value in path.values
            if value != end
        )

    def readers(self, value: int) -> list[int | None]:
        """What a value is multiplied with as a matrix, as arguments; None for any other use."""
        found: list[int | None] = []
        pending = [value]
        while pending:
            for index, position in self._program.users.get(pending.pop(), ()):
                operation = self._program.operations[index]
                if operation.name in _PASSED + _MOVES:
                    pending.extend(operation.gives)
                elif operation.name == "dot_general":
                    found.append(self._argument(operation.takes[1 - position]))
                else:
                    found.append(None)
        return found

    def _argument(self, value: int) -> int | None:
        """The argument that a value merely moves or casts."""
        while value in self._program.makers:
            operation = self._program.operations[self._program.makers[value]]
            if operation.name not in _PASSED + _MOVES:
                return None
            [value] = operation.takes
        return value if value in self._program.arguments else None

    def _ways(
        self, value: int, strides: Strides, offset: float, steps: int = 0
    ) -> tuple[ScalePath, ...]:
        key = value, strides, offset
        if key not in self._known:
            found = self._found(value, strides, offset, steps) if steps < _MOST_STEPS else []
            self._known[key] = tuple(found)
        return self._known[key]

    def _found(self, value: int, strides: Strides, offset: float, steps: int) -> list[ScalePath]:
        wanted = {value: (strides, offset)}
        if value in self._divisible:
            return [ScalePath(wanted, frozenset(), (value,), frozenset())]
        if value not in self._program.makers:
            return []
        index = self._program.makers[value]
        operation = self._program.operations[index]
        found: list[ScalePath] = []
        for needs in self._alternatives(operation, strides, offset):
            if not all(any(need.strides) for need in needs):
                continue  # one scale for all changes nothing
            ways = [
                self._ways(operation.takes[need.position], need.strides, need.offset, steps + 1)
                for need in needs
            ]
            here = ScalePath(
                wanted,
                frozenset((index, need.position) for need in needs),
                (),
                frozenset().union(*(need.shared for need in needs)),
            )
            for chosen in product(*ways):
                whole: ScalePath | None = here
                for way in chosen:
                    whole = None if whole is None else whole.joined(way)
                if whole is not None and len(found) < _MOST_WAYS:
                    found.append(whole)
        return found

    def _alternatives(
        self, operation: Operation, strides: Strides, offset: float
    ) -> Iterator[list[_Need]]:
        """Sets of operands that, all scaled, scale the operation's result."""
        name, takes = operation.name, operation.takes
        if name in _MOVES or name in _PASSED:
            moved = self._moved_back(operation, strides)
            if moved is not None:
                yield [_Need(0, *moved, offset)]
        elif offset:
            return  # only a weight itself is offset
        elif name in ("neg", "abs"):
            yield [_Need(0, strides)]
        elif name in ("mul", "div"):
            for position in range(2 if name == "mul" else 1):
                yield [self._operand(operation, position, strides)]
        elif name in ("add", "sub", "add_any"):
            yield from self._sums(operation, strides)
        elif name in ("max", "min"):
            # Of a value and zero, as ReLU.
            others = [position for position in (0, 1) if self._number(takes[position]) != 0]
            if len(others) == 1:
                yield [self._operand(operation, others[0], strides)]
        elif name == "select_n":
            yield [
                self._operand(operation, position, strides)
                for position in range(1, len(takes))
                if self._number(takes[position]) != 0
            ]
        elif name == "reduce_sum":
            axes = operation.params["axes"]
            left = iter(strides)
            rank = len(self._program.shapes[takes[0]])
            yield [_Need(0, tuple(0 if axis in axes else next(left) for axis in range(rank)))]
        elif name == "dot_general":
            for position in (0, 1):
                yield [self._factor(operation, position, strides)]

    def _sums(self, operation: Operation, strides: Strides) -> Iterator[list[_Need]]:
        numbers = [self._number(value) for value in operation.takes]
        sign = -1 if operation.name == "sub" else 1
        if numbers[1]:
            yield [self._operand(operation, 0, strides, offset=sign * numbers[1])]
        elif numbers[0]:
            if sign == 1:
                yield [self._operand(operation, 1, strides, offset=numbers[0])]
        else:
            positions = [position for position in (0, 1) if numbers[position] is None]
            yield [self._operand(operation, position, strides) for position in positions]

    def _operand(
        self, operation: Operation, position: int, strides: Strides, offset: float = 0.0
    ) -> _Need:
        """An operand of an elementwise operation, which may have axes of size 1."""
        shape = self._program.shapes[operation.takes[position]]
        whole = self._program.shapes[operation.gives[0]]
        if not shape:
            return _Need(position, ())
        shared = frozenset(
            (size, stride)
            for own, size, stride in zip(shape, whole, strides, strict=True)
            if stride and own != size
        )
        own_strides = tuple(
            stride if own > 1 else 0 for own, stride in zip(shape, strides, strict=True)
        )
        return _Need(position, own_strides, shared, offset)

    def _factor(self, operation: Operation, position: int, strides: Strides) -> _Need:
        """A factor of a product of matrices."""
        contracted, batched = operation.params["dimension_numbers"]
        shapes = [self._program.shapes[value] for value in operation.takes]
        free = [
            [a for a in range(len(shape)) if a not in contracted[side] and a not in batched[side]]
            for side, shape in enumerate(shapes)
        ]
        num_batched = len(batched[0])
        own = [0] * len(shapes[position])
        for axis, stride in zip(batched[position], strides[:num_batched], strict=True):
            own[axis] = stride
        start = num_batched + (len(free[0]) if position else 0)
        for number, axis in enumerate(free[position]):
            own[axis] = strides[start + number]
        start = num_batched + (0 if position else len(free[0]))
        shared = frozenset(
            (shapes[1 - position][axis], strides[start + number])
            for number, axis in enumerate(free[1 - position])
            if strides[start + number]
        )
        return _Need(position, tuple(own), shared)

    def _moved_back(self, operation: Operation, strides: Strides) -> tuple[Strides, _Shared] | None:
        """Strides of the operand of an operation that only moves or casts values."""
        shape = self._program.shapes[operation.takes[0]]
        whole = self._program.shapes[operation.gives[0]]
        match operation.name:
            case "transpose":
                own = [0] * len(shape)
                for stride, axis in zip(strides, operation.params["permutation"], strict=True):
                    own[int(axis)] = stride
                return tuple(own), frozenset()
            case "squeeze":
                axes = {int(axis) % len(shape) for axis in operation.params["dimensions"]}
                left = iter(strides)
                return tuple(0 if a in axes else next(left) for a in range(len(shape))), frozenset()
            case "broadcast_in_dim":
                places = [int(axis) for axis in operation.params["broadcast_dimensions"]]
                own = [strides[a] if size > 1 else 0 for a, size in zip(places, shape, strict=True)]
                kept = {a for a, size in zip(places, shape, strict=True) if size > 1}
                shared = frozenset(
                    (size, stride)
                    for axis, (size, stride) in enumerate(zip(whole, strides, strict=True))
                    if stride and axis not in kept
                )
                return tuple(own), shared
            case "reshape":
                reshaped = reshaped_strides(whole, strides, shape)
                return None if reshaped is None else (reshaped, frozenset())
        return strides, frozenset()

    def _number(self, value: int) -> float | None:
        """The number that all of a value is, if it is known."""
        while value not in self._program.numbers:
            if value not in self._program.makers:
                return None
            operation = self._program.operations[self._program.makers[value]]
            if operation.name not in _PASSED + _MOVES:
                return None
            [value] = operation.takes
        return self._program.numbers[value]


def reshaped_strides(
    shape: Sequence[int], strides: Strides, wanted: Sequence[int]
) -> Strides | None:
    """Strides of the same values in another shape; None if no strides say it."""
    if 0 in shape:
        return None
    found = [0] * len(wanted)
    i = j = 0
    while i < len(shape) or j < len(wanted):
        # The shortest runs of axes that hold the same number of values.
        first, begin = i, j
        size = own = 1
        while size != own or (i, j) == (first, begin):
            if i < len(shape) and (size <= own or j == len(wanted)):
                size, i = size * shape[i], i + 1
            else:
                own, j = own * wanted[j], j + 1
        axes = [axis for axis in range(first, i) if shape[axis] > 1]
        if not any(strides[axis] for axis in axes):
            continue
        for outer, inner in pairwise(axes):
            if strides[outer] != strides[inner] * shape[inner]:
                return None
        step = strides[axes[-1]]
        for axis in reversed(range(begin, j)):
            found[axis] = step if wanted[axis] > 1 else 0
            step *= wanted[axis]
    return tuple(found)
