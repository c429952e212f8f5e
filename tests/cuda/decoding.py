"""Compile what decodes a solved layer on a GPU; its bits are to be those of NumPy on the host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from quantizer import AWQScheme, GPTQScheme, Int8Scheme
from quantizer.keras_format.kernel_layout import dense_layout
from quantizer.keras_format.variables import _decode_program
from tests.cuda.programs import Compiled
from tests.cuda.topology import placed


@dataclass(frozen=True)
class CompiledDecoding:
    """The program that decodes a layer.

    Attributes:
        divides: whether it divides in float32, which GPUs do with errors in the last bit.
    """

    program: Compiled
    divides: bool

    def problems(self) -> list[str]:
        if self.divides:
            return [f"{self.program.name}: divides in float32"]
        large = self.program.temporary_bytes > 1 << 20
        return [f"{self.program.name}: keeps more than the kernel"] if large else []


def compile_decoding(where: Any, in_features: int, out_features: int) -> list[CompiledDecoding]:
    """A layer's kernel from what is stored of it, in each way to decode one."""

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    groups = in_features // 128
    codes = {
        "quantized_kernel": shape(jnp.uint8, out_features // 2, in_features),
        "kernel_scale": shape(jnp.float32, out_features, groups),
        "kernel_zero": shape(jnp.uint8, out_features, groups),
        "g_idx": shape(jnp.float32, in_features),
    }
    channels = {
        "kernel": shape(jnp.int8, in_features, out_features),
        "kernel_scale": shape(jnp.float32, out_features),
    }
    compiled = []
    for scheme, stored in (
        (GPTQScheme(), codes),
        (AWQScheme(), codes | {"awq_scales": shape(jnp.float32, in_features)}),
        (Int8Scheme(), channels),
    ):
        layout = dense_layout((in_features, out_features))
        with jax.enable_x64(True):
            lowered = _decode_program.lower(placed(stored, where), layout, scheme, "bfloat16")
        name = f"{in_features} × {out_features} decoded from {scheme.policy}"
        divides = re.search(r"= f32\[\d+,\d+\]\S* divide\(", lowered.compile().as_text())
        compiled.append(CompiledDecoding(Compiled.of(name, lowered), divides is not None))
    return compiled
