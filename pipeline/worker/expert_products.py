"""Where a traced block uses banks of experts, and to which experts its router sends each row.

KerasHub computes every row by every expert, and weighs the results by the router's choice. A bank
[experts, in_features, out_features] is multiplied in one of two ways: all experts read the same
rows, [..., in_features], or each reads rows of its own, [experts, rows, in_features].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Jaxpr, Literal


@dataclass(frozen=True)
class ExpertProduct:
    """The product with a bank.

    Attributes:
        equation: number of the program's equation.
        input: the variable that the experts read.
        input_axis: its axis of in_features, counted from its end.
        own: whether each expert has rows of its own.
        router: the router's choice for the rows: numbers of experts, [rows, experts per row]; None
            if it is not known, as of a block with several routers.
    """

    equation: int
    input: Any
    input_axis: int
    own: bool
    router: Any | None

    @property
    def experts_per_row(self) -> int:
        """Of the router's choice; 0 if it is not known."""
        return 0 if self.router is None else _shape(self.router)[1]

    @property
    def choice(self) -> Any | None:
        """The router's choice where each expert has rows of its own; otherwise None."""
        return self.router if self.own else None

    def operands(self, equation: Any) -> tuple[Any, Any]:
        """The input and the bank of the product's equation."""
        first, second = equation.invars
        return (first, second) if first is self.input else (second, first)

    def result_axes(self, equation: Any) -> tuple[int, int, int]:
        """Where the result of the product's equation has axes of [experts, rows, out_features]."""
        bank_first = equation.invars[0] is not self.input
        if bank_first:
            return (0, 2, 1)
        return (0, 1, 2) if self.own else (1, 0, 2)


def expert_products(program: Jaxpr, banks: Iterable[Any]) -> dict[Any, ExpertProduct]:
    """The products with these arguments of a program, as far as they are used as banks.

    Args:
        banks: the arguments' variables; left out are those that are used in any other way, or more
            than once.
    """
    origins = {bank: bank for bank in banks}
    uses: dict[Any, list[tuple[int, int] | None]] = {bank: [] for bank in origins}
    for number, equation in enumerate(program.eqns):
        for position, value in enumerate(equation.invars):
            if isinstance(value, Literal) or value not in origins:
                continue
            if equation.primitive.name == "convert_element_type":
                origins[equation.outvars[0]] = origins[value]
            elif equation.primitive.name == "dot_general":
                uses[origins[value]].append((number, position))
            else:
                uses[origins[value]].append(None)
    for result in program.outvars:
        if not isinstance(result, Literal) and result in origins:
            uses[origins[result]].append(None)
    choices = _choices(program)
    found = {}
    for bank, [*of_bank] in uses.items():
        if len(of_bank) == 1 and of_bank[0] is not None:
            product = _product(program, *of_bank[0], choices)
            if product is not None:
                found[bank] = product
    return found


def _choices(program: Jaxpr) -> dict[int, list[Any]]:
    """Numbers of the largest entries in rows of some length, by that length."""
    found: dict[int, list[Any]] = {}
    for equation in program.eqns:
        if equation.primitive.name == "top_k":
            indices, length = equation.outvars[1], _shape(equation.invars[0])[-1]
            if len(_shape(indices)) == 2 and _shape(indices)[-1] < length:
                found.setdefault(length, []).append(indices)
    return found


def _product(
    program: Jaxpr, number: int, position: int, choices: Mapping[int, Sequence[Any]]
) -> ExpertProduct | None:
    """What a product with a bank is; None if it is of another kind."""
    equation = program.eqns[number]
    contracted, batched = equation.params["dimension_numbers"]
    given, bank = equation.invars[1 - position], equation.invars[position]
    if isinstance(given, Literal) or tuple(contracted[position]) != (1,):
        return None
    [axis] = contracted[1 - position]
    shape, chosen = _shape(given), choices.get(_shape(bank)[0], [])
    own = bool(batched[position])
    # Numbers of rows have to agree, which several routers might.
    known = len(chosen) == 1 and len(shape) == 2 + own and _shape(chosen[0])[0] == shape[-2]
    router = chosen[0] if known else None
    if not own:
        return ExpertProduct(number, given, axis - len(shape), own, router)
    # Whose rows they are is known of no other arrangement.
    in_order = tuple(batched[position]) == (0,) and tuple(batched[1 - position]) == (0,)
    if not in_order or axis != 2 or router is None:
        return None
    return ExpertProduct(number, given, -1, own, router)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.aval.shape)
