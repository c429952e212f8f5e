"""The formats of checkpoints, and of the codes in them.

Importing this needs neither JAX nor Keras, so that the command line may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

ExportFormat: TypeAlias = Literal["compressed-tensors", "gptq", "dense"]
"""Of a checkpoint; dense stores every weight in float."""

Activations: TypeAlias = Literal["float", "int8", "float8"]
"""What a layer's inputs are rounded to at run time: int8 by token, float8 by a stored scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeFormat:
    """What the codes of a layer are.

    Attributes:
        bits: of each code.
        is_float: E4M3 values, not integers.
        symmetric: every zero point is the middle of the codes' range.
        group_size: inputs under one scale; -1 for a scale per output channel.
    """

    bits: int
    is_float: bool = False
    symmetric: bool = True
    group_size: int = -1
    activations: Activations = "float"

    @property
    def described(self) -> str:
        """In a few words, such as "4 bits, symmetric, groups of 64"."""
        if self.is_float:
            return "float8 weights and inputs"
        if self.activations == "int8":
            return "8 bits, int8 inputs"
        groups = "per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {groups}"


def code_format(scheme: Scheme) -> CodeFormat | None:
    """The format of a scheme's codes; None if other runtimes have none: an awq not foldable."""
    match scheme:
        case GPTQScheme():
            return CodeFormat(
                bits=scheme.weight_bits, symmetric=scheme.symmetric, group_size=scheme.group_size
            )
        case Int8Scheme():
            activations: Activations = "int8" if scheme.quantize_activations else "float"
            return CodeFormat(bits=8, activations=activations)
        case Int4Scheme():
            per_channel = scheme.block_size == -1
            return CodeFormat(bits=4, symmetric=per_channel, group_size=scheme.block_size)
        case Float8Scheme():
            return CodeFormat(bits=8, is_float=True, activations="float8")
        case AWQScheme():
            if not scheme.foldable:
                return None
            return CodeFormat(bits=4, symmetric=False, group_size=scheme.group_size)
