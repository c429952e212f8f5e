"""The codes of a bank of experts: matrices of one shape that a layer holds in one variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quantizer.qparams import contiguous_groups
from quantizer.result import Float32, GroupedWeight
from quantizer.schemes import GPTQScheme, Int4Scheme, Int8Scheme, Scheme

_BAND = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCodes:
    """value = (code - zero) · scale, in float32.

    Attributes:
        codes_ERC: [experts, out_features, in_features], below 2**bits.
        scale_ERG: of each group of inputs, in the dtype in which it is stored.
        zero_ERG: the code of 0.
        bits: of each code.
        group_size: inputs that share a scale, in their order; -1 if all of a channel do.
        symmetric: every zero point is the middle of the codes' range.
    """

    codes_ERC: NDArray[np.uint8]
    scale_ERG: NDArray[Any]
    zero_ERG: NDArray[np.uint8]
    bits: int
    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, weight: GroupedWeight, scheme: Scheme, num_experts: int, scale_dtype: str) -> Self:
        """From the stacked matrices of all experts, [experts · out_features, in_features]."""
        bits, group_size, symmetric = code_format(scheme)
        in_features = weight.codes_RC.shape[1]
        assert np.array_equal(weight.group_C, contiguous_groups(in_features, group_size))
        groups = weight.scale_RG.shape[1]
        return cls(
            codes_ERC=weight.codes_RC.reshape(num_experts, -1, in_features).view(np.uint8),
            scale_ERG=weight.scale_RG.astype(scale_dtype).reshape(num_experts, -1, groups),
            zero_ERG=weight.zero_RG.reshape(num_experts, -1, groups).view(np.uint8),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
        )

    @property
    def in_features(self) -> int:
        """Of each expert's matrix."""
        return int(self.codes_ERC.shape[2])

    def kernel(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The variable, [experts, in_features, out_features], rounded to its dtype."""
        num_experts, out_features, in_features = self.codes_ERC.shape
        kernel_ECR = np.empty((num_experts, in_features, out_features), dtype)
        for expert, kernel_CR in enumerate(kernel_ECR):  # one at a time: a bank is large
            value_RC = self.dequantize(expert).astype(dtype)
            # In bands that stay in cache: a plain transposition takes three times as long.
            for a in range(0, out_features, _BAND):
                kernel_CR[:, a : a + _BAND] = value_RC[a : a + _BAND].T
        return kernel_ECR

    def dequantize(self, expert: int) -> Float32:
        """An expert's decoded weights, [out_features, in_features], float32."""
        value_RC: Float32 = self.codes_ERC[expert].astype(np.float32)
        value_RC -= self._by_input(self.zero_ERG[expert])
        value_RC *= self._by_input(self.scale_ERG[expert])
        return value_RC

    def _by_input(self, value_RG: NDArray[Any]) -> Float32:
        size = self.in_features if self.group_size == -1 else self.group_size
        return np.repeat(value_RG.astype(np.float32), size, axis=1)[:, : self.in_features]


def code_format(scheme: Scheme) -> tuple[int, int, bool]:
    """Bits, group size and symmetry of the codes of experts in a scheme."""
    match scheme:
        case GPTQScheme():
            return scheme.weight_bits, scheme.group_size, scheme.symmetric
        case Int8Scheme():
            return 8, -1, True
        case Int4Scheme():
            return 4, scheme.block_size, scheme.block_size == -1
        case _:
            raise TypeError(f"experts have no codes in {scheme.mode}")
